"""Deep mutual learning (Zhang et al., CVPR 2018, arXiv 1706.00384): two students teach each other, without a teacher."""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdkernels import Teacher, TeacherHead, TeacherLogits
from kdtrain.methods.base import Method, RunStudent, Step
from kdtrain.methods.kd import Temperature, Weight
from kdtrain.outputs import Batch, HeadOutputs, LogitOutputs, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import MethodOptions


class MutualLearning(Method):
    """`ce_weight * CE(z) + kd_weight * T^2 KL(p_peer || p)` for the student, and the same for a peer.

    Each takes the probabilities of the other as they are, without a gradient (equations 4 to 7 of the paper). The peer is a
    second student of the same shape that is trained along and not saved with the student. It costs as much as the student.
    """

    tasks = frozenset({"classification", "code_lm"})

    class Options(MethodOptions):
        """A second student that learns along."""

        name: Literal["dml"] = "dml"
        temperature: Temperature = Field(
            default=1.0,
            description="T that softens both sides; value and gradient are multiplied by T squared",
        )
        kd_weight: Weight = Field(default=1.0, description="weight of the divergence from the other student")
        ce_weight: Weight = Field(default=1.0, description="weight of the cross entropy with the labels")
        peer: Literal["new", "copy"] = Field(
            default="new",
            description="new: random weights of its own; copy: the weights of the student, for one that is trained already",
        )

    @classmethod
    def teachers_of(cls, options: Any) -> tuple[str, ...]:
        """None."""
        return ()

    def attach(self, student: nn.Module, run: RunStudent) -> None:
        """Make the peer."""
        kind: Any = type(student)
        new = self.options.peer == "new"
        self.peer = kind(student.config) if new else copy.deepcopy(student)
        self._run = run

    def weights(self, step: Step) -> dict[str, float]:
        """kd, ce and peer, the loss of the peer."""
        return {"kd": self.options.kd_weight, "ce": self.options.ce_weight, "peer": 1.0}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd, ce and peer."""
        peer = self._run(self.peer, batch)
        weights = {"kd": self.options.kd_weight, "ce": self.options.ce_weight}
        temperature = self.options.temperature
        loss, _ = peer.total(
            {
                "kd": peer.divergence(as_teacher(student), "forward_kl", temperature=temperature),
                "ce": peer.cross_entropy(),
            },
            weights,
            1,
        )
        return {
            "kd": student.divergence(as_teacher(peer), "forward_kl", temperature=temperature),
            "ce": student.cross_entropy(),
            "peer": loss,
        }


@torch.no_grad()
def as_teacher(student: Outputs) -> TeacherOutputs:
    """The distribution of a student as that of a teacher, without a graph."""
    target: Teacher
    if isinstance(student, LogitOutputs):
        target = TeacherLogits(student.logits.detach())
    else:
        assert isinstance(student, HeadOutputs)
        head = student.head
        target = TeacherHead(
            student.hidden.detach().to(head.weight.dtype),
            head.weight.detach(),
            None if head.bias is None else head.bias.detach(),
            softcap=head.softcap,
            scale=head.scale,
        )
    return TeacherOutputs(target=target)
