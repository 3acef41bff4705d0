"""MoKD: distillation as two-objective optimisation (Hayder et al. 2025, arXiv 2505.08170)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdkernels import projection_mse
from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Method, Needs, Pairs, Step, dot
from kdtrain.methods.divergences import DivergenceChoice, divergence_of
from kdtrain.methods.kd import Temperature, Weight
from kdtrain.methods.layers import check_layer_map
from kdtrain.models.loading import Shape
from kdtrain.outputs import Batch, LogitTerm, Outputs, TeacherOutputs
from kdtrain.recipe.base import FINITE, NOT_NEGATIVE, POSITIVE, MethodOptions, Number, Whole

SMALLEST = 1e-12
"""A loss below this counts as this, so that its logarithm is finite."""


class MultiObjective(Method):
    """The shortest vector between the gradients of a distillation loss and a task loss, each as a logarithm.

    `L_d = kd_weight * T^2 D + feature_weight * F`, `L_t = CE`; `g_d = grad log L_d`, `g_t = grad log L_t`. The step follows
    `pi g_d + (1 - pi) g_t` with `pi = (<g_t, g_t> - <g_d, g_t>) / |g_d - g_t|^2`, clipped to [0, 1]. Inside that range both
    gradients have the same inner product with the step, so neither conflicts with it and neither dominates. Each gradient
    costs a forward and a backward pass.

    `gradients: amortised` takes one pass. A softmax over two learned logits gives pi, and the logits descend on
    `|pi log L_d + (1 - pi) log L_t|^2 / 2`: a stand-in on losses, not on gradients. Losses are those of the step before.

    F is the squared distance of L2-normalised states in a space of `subspace_width` dimensions: the student enters by a
    learned linear map, the teacher by a fixed one with orthonormal columns, which keeps its inner products.

    The text of 2505.08170 was not at hand. The weights follow the algorithm of its authors' DTO-KD (ICLR 2026) as a public
    note gives it; the clip is that of MGDA. The maps into the subspace are a choice made here.
    """

    gradient_groups = (("kd", "feature"), ("ce",))

    class Options(MethodOptions):
        """Gradients of distillation and task, combined without conflict."""

        name: Literal["mokd"] = "mokd"
        divergence: DivergenceChoice = Field(
            default="forward_kl", description="between the distributions of teacher and student"
        )
        temperature: Temperature = Field(default=2.0, description="T that softens both sides")
        kd_weight: Weight = Field(
            default=1.0, description="weight of the divergence inside the distillation loss"
        )
        feature_weight: Weight = Field(
            default=0.0, description="weight of the states inside the distillation loss; 0 reads no states"
        )
        layer_map: Pairs = Field(
            default=(), description="pairs [student layer, teacher layer]; by default the last of both"
        )
        subspace_width: Annotated[Whole, POSITIVE] | None = Field(
            default=None, description="dimensions in which states meet; by default twice those of the teacher"
        )
        gradients: Literal["exact", "amortised"] = Field(
            default="exact",
            description="a pass for each of the two gradients, or one pass with learned weights",
        )
        share_rate: Annotated[Number, POSITIVE, FINITE] = Field(
            default=0.025, description="learning rate of the weights (amortised)"
        )
        share_decay: Annotated[Number, NOT_NEGATIVE, FINITE] = Field(
            default=0.01, description="weight decay of the logits of the weights (amortised)"
        )

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        (teacher,) = teachers.values()
        if options.kd_weight == options.feature_weight == 0:
            raise KdtrainError(
                "method.kd_weight and method.feature_weight are both 0, so there is nothing to distil; set one of them above 0"
            )
        self.divergence = divergence_of(options.divergence)
        self.pairs: Pairs = ()
        self.projections = nn.ModuleList()
        self._logged: dict[str, Tensor] = {}
        if options.feature_weight:
            self.pairs = options.layer_map or ((student.layers, teacher.layers),)
            check_layer_map(self.pairs, student.layers, teacher.layers)
            width = options.subspace_width or 2 * teacher.width
            if width < teacher.width:
                raise KdtrainError(
                    f"method.subspace_width is {width}, below the {teacher.width} dimensions of the teacher's states; set it "
                    f"to {teacher.width} or more"
                )
            for number, _ in enumerate(self.pairs):
                self.projections.append(nn.Linear(student.width, width))
                basis = torch.linalg.qr(torch.randn(width, teacher.width)).Q
                self.register_buffer(f"basis_{number}", basis)
        if options.gradients == "amortised":
            self.gradient_groups = ()
            self.register_buffer("logits", torch.zeros(2, dtype=torch.float64))
            self.register_buffer("losses", torch.ones(2, dtype=torch.float64))
            self._read = (-1, (0.5, 0.5))

    def needs(self) -> Needs:
        """States of the paired layers."""
        return Needs(layers=self.pairs)

    def weights(self, step: Step) -> dict[str, float]:
        """kd, perhaps feature, and ce."""
        of_teacher = of_labels = 1.0
        if self.options.gradients == "amortised":
            if self._read[0] != step.number:
                assert isinstance(self.logits, Tensor) and isinstance(self.losses, Tensor)
                self._read = (step.number, tuple((self.logits.softmax(0) / self.losses).tolist()))
            of_teacher, of_labels = self._read[1]
        feature = {"feature": of_teacher * self.options.feature_weight} if self.pairs else {}
        return {"kd": of_teacher * self.options.kd_weight, **feature, "ce": of_labels}

    def terms(
        self, step: Step, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Tensor | LogitTerm]:
        """kd, perhaps feature, and ce."""
        (teacher,) = teachers.values()
        terms: dict[str, Tensor | LogitTerm] = {
            "kd": student.divergence(teacher, self.divergence, temperature=self.options.temperature)
        }
        distances = []
        for number, ((ours, theirs), projection) in enumerate(zip(self.pairs, self.projections, strict=True)):
            basis, states = getattr(self, f"basis_{number}"), teacher.states[theirs]
            assert isinstance(projection, nn.Linear)
            distances.append(
                projection_mse(
                    student.states[ours],
                    states @ basis.to(states.dtype).T,
                    projection.weight,
                    projection.bias,
                    normalize=True,
                    mask=student.counted,
                    reduction="sum",
                )
            )
        if distances:
            terms["feature"] = sum(distances[1:], distances[0]) / (len(distances) * student.texts)
        return {**terms, "ce": student.cross_entropy()}

    def two_losses(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """L_d and L_t out of the mean values of the terms.

        Raises:
            KdtrainError: the two are known by their sum alone.
        """
        if "kd" not in values:
            raise KdtrainError(
                "method.gradients amortised reads both losses, and for these stored outputs of the teacher only their sum is "
                "computed; set method.gradients: exact"
            )
        distillation = self.options.kd_weight * values["kd"]
        if self.pairs:
            distillation = distillation + self.options.feature_weight * values["feature"]
        return distillation.clamp_min(SMALLEST), values["ce"].clamp_min(SMALLEST)

    def combine(
        self, step: Step, gradients: list[list[Tensor]], values: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """The shortest vector; logged are the cosine, the ratio of the norms (without logarithms), and pi."""
        teacher, labels = gradients
        of_teacher, of_labels = self.two_losses(values)
        both = dot(teacher, labels)
        squares = dot(teacher, teacher), dot(labels, labels)
        share = shortest(
            squares[0] / of_teacher**2, squares[1] / of_labels**2, both / (of_teacher * of_labels)
        )
        left, right = share / of_teacher, (1 - share) / of_labels
        norms = squares[0].sqrt(), squares[1].sqrt()
        self._logged = {
            "gradient_cosine": both / (norms[0] * norms[1]).clamp_min(SMALLEST),
            "gradient_norm_ratio": norms[0] / norms[1].clamp_min(SMALLEST),
            "distillation_share": share,
        }
        return [left.to(a.dtype) * a + right.to(a.dtype) * b for a, b in zip(teacher, labels, strict=True)]

    def logged(self) -> dict[str, Tensor]:
        """What `combine` found."""
        return self._logged

    @torch.no_grad()
    def after_step(self, step: Step, values: Mapping[str, Tensor]) -> None:
        """Amortised: move the logits, and keep the losses for the next step."""
        if self.options.gradients == "exact":
            return
        assert isinstance(self.logits, Tensor) and isinstance(self.losses, Tensor)
        losses = torch.stack(self.two_losses(values)).double()
        logs, shares = losses.log(), self.logits.softmax(0)
        inner = (shares * logs).sum()
        slope = inner * shares * (logs - inner)
        self.logits -= self.options.share_rate * (slope + self.options.share_decay * self.logits)
        self.losses.copy_(losses)


def shortest(first: Tensor, second: Tensor, between: Tensor) -> Tensor:
    """The weight of the first of two vectors in the shortest vector of the segment between them.

    Args:
        first, second: their squared norms, 0-D.
        between: their inner product.
    """
    distance = first + second - 2 * between
    share = ((second - between) / distance.clamp_min(torch.finfo(distance.dtype).tiny)).clamp(0, 1)
    return torch.where(distance > 0, share, torch.full_like(share, 0.5))
