"""ONE (Lan et al., NeurIPS 2018, arXiv 1806.04606): branches of one network teach each other as a gated ensemble."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdkernels import TeacherLogits, kd_loss
from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Method, Needs, RunStudent, Step
from kdtrain.methods.kd import Temperature, Weight
from kdtrain.models.loading import Shape
from kdtrain.outputs import IGNORED, Batch, LogitOutputs, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import MethodOptions, Whole


class NativeEnsemble(Method):
    """`sum_i CE(z_i) + CE(z_e) + kd_weight * T^2 sum_i KL(p_e || p_i)` with `z_e = sum_i g_i z_i`; needs no teacher.

    z_0 are the logits of the student. The other branches are heads of two layers on the state of `stem_layer`, and the
    gate g is a softmax of a linear map of it. The paper branches whole blocks of a convolutional network instead. The
    ensemble teaches without a gradient; T = 3 as in the paper. Branches and gate are not saved with the student.
    """

    # Branches give class logits of a sentence state.
    tasks = frozenset({"classification"})

    class Options(MethodOptions):
        """Branches of the student that teach each other."""

        name: Literal["one"] = "one"
        branches: Annotated[Whole, Field(ge=1)] = Field(
            default=2, description="branches in addition to the student's own head"
        )
        stem_layer: Annotated[Whole, Field(ge=1)] | None = Field(
            default=None, description="layer whose state the branches read; by default the last"
        )
        temperature: Temperature = Field(
            default=3.0,
            description="T that softens both sides; value and gradient are multiplied by T squared",
        )
        kd_weight: Weight = Field(default=1.0, description="weight of the divergences from the ensemble")
        ce_weight: Weight = Field(default=1.0, description="weight of all cross entropies with the labels")

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        self.stem = options.stem_layer or student.layers
        if self.stem > student.layers:
            raise KdtrainError(
                f"method.stem_layer is {self.stem}, but the student has layers 1 to {student.layers}"
            )
        self.width = student.width

    @classmethod
    def teachers_of(cls, options: Any) -> tuple[str, ...]:
        """None."""
        return ()

    def attach(self, student: nn.Module, run: RunStudent) -> None:
        """Make branches for the classes of the student."""
        config: Any = student.config
        classes = int(config.num_labels)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, classes))
            for _ in range(self.options.branches)
        )
        self.gate = nn.Linear(self.width, self.options.branches + 1)

    def needs(self) -> Needs:
        """The state of the stem."""
        return Needs(layers=((self.stem, 0),))

    def weights(self, step: Step) -> dict[str, float]:
        """kd and ce of the student, and those of the branches."""
        kd, ce = self.options.kd_weight, self.options.ce_weight
        return {"kd": kd, "ce": ce, "branch_kd": kd, "branch_ce": ce}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd and ce of the student, and those of the branches."""
        assert isinstance(student, LogitOutputs)
        state = student.states[self.stem]
        state = state.view(len(student.logits), student.texts, -1).mean(1)
        branches = [branch(state) for branch in self.branches]
        every = torch.stack([student.logits, *branches], dim=1)
        ensemble = (self.gate(state).softmax(1).unsqueeze(2) * every).sum(1)
        target = TeacherLogits(ensemble.detach())
        temperature = self.options.temperature

        def entropy(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, student.labels, ignore_index=IGNORED, reduction="sum")

        divergences = [
            kd_loss(branch, target, temperature=temperature, reduction="sum") for branch in branches
        ]
        return {
            "kd": student.divergence(TeacherOutputs(target=target), "forward_kl", temperature=temperature),
            "ce": student.cross_entropy(),
            "branch_kd": torch.stack(divergences).sum(),
            "branch_ce": torch.stack([entropy(logits) for logits in (*branches, ensemble)]).sum(),
        }
