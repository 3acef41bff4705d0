"""GKD (Agarwal et al., ICLR 2024, arXiv 2306.13649): a mixture of the data and of the student's own continuations."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdtrain.methods.base import Generate, Step
from kdtrain.methods.divergences import DivergenceChoice
from kdtrain.methods.sampling import OnPolicy, SamplingOptions, Written, uniform, write
from kdtrain.outputs import Batch
from kdtrain.recipe.base import Number


class GeneralizedDistillation(OnPolicy):
    """The terms of kd; with probability `student_share` a step learns from what the student continues its prompts with.

    Algorithm 1 of the paper: lambda is `student_share`, and the divergence is any (the paper's is the JSD with beta). No
    gradient passes through the sampling. `student_share: 1` is on-policy distillation, 0 is kd.
    """

    class Options(SamplingOptions):
        """Soft labels on the data and on the student's own continuations."""

        name: Literal["gkd"] = "gkd"
        divergence: DivergenceChoice = Field(
            default="jsd", description="between the distributions of teacher and student"
        )
        student_share: Annotated[Number, Field(ge=0, le=1)] = Field(
            default=0.5, description="probability that a step learns from continuations of the student"
        )

    def samples(self, step: Step) -> bool:
        """Whether a step learns from continuations of the student."""
        return float(uniform(1, step.seed, step.number)) < self.options.student_share

    def make_batch(self, step: Step, batch: Batch, generate: Generate) -> Batch:
        """The batch, or prompts with continuations."""
        self._sampled = self.samples(step)
        if not self._sampled:
            return batch

        def sampler(student: Any, teachers: Mapping[str, Any]) -> Written:
            (teacher,) = teachers.values()
            return write(batch, self.options, step, student, teacher)[0]

        return generate(sampler).batch(batch)

    def logged(self) -> dict[str, Tensor]:
        """Whether the step sampled."""
        return {"sampled_steps": torch.tensor(float(self._sampled))}
