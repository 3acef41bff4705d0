"""DistiLLM (Ko et al., ICML 2024, arXiv 2402.03898): skewed divergences, and the student's own continuations when it needs them."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdtrain.methods.base import Generate, Step
from kdtrain.methods.divergences import DivergenceChoice
from kdtrain.methods.sampling import OnPolicy, Prompts, SamplingOptions, Written, uniform, write
from kdtrain.models.loading import Shape
from kdtrain.outputs import Batch
from kdtrain.recipe.base import NOT_NEGATIVE, POSITIVE, Number, Whole

Source = Literal["data", "student", "replay"]


class SkewedDistillation(OnPolicy):
    """The terms of kd with a skewed KL, on the data, on continuations of the student, or on earlier continuations.

    A threshold phi starts at `first_threshold` and rises by 0.1, to 1 at most, where an evaluation finds a loss that is
    `loss_tolerance` above the one at the last rise (the first evaluation before any). A step draws r in [0, 1):

        r < phi * replay(t), or r < phi while the replay buffer is not full: sample, learn from it, store it
        r < phi: learn from rows of the replay buffer
        otherwise: learn from the data

    replay(t) is 1 - t, t or 1/2 of the share t of the steps (section 3.2 and the authors' code, whose defaults these are).
    The code evaluates before the first step, too. Its language modelling term on a second corpus is not here.
    The buffer holds the newest rows and is checkpointed.
    """

    class Options(SamplingOptions):
        """A skewed KL, on the data and on continuations of the student."""

        name: Literal["distillm"] = "distillm"
        divergence: DivergenceChoice = Field(
            default="skew_kl", description="between the distributions of teacher and student"
        )
        first_threshold: Annotated[Number, Field(ge=0, le=1)] = Field(
            default=0.0, description="probability of continuations at the start"
        )
        loss_tolerance: Annotated[Number, NOT_NEGATIVE] = Field(
            default=0.1, description="rise of the evaluated loss at which the probability rises by 0.1"
        )
        replay: Literal["decreasing", "increasing", "constant"] = Field(
            default="decreasing", description="how the share of new continuations changes"
        )
        replay_capacity: Annotated[Whole, POSITIVE] = Field(
            default=1000, description="rows of the replay buffer"
        )
        replay_width: Annotated[Whole, Field(ge=2)] = Field(
            default=512, description="tokens of a row of the replay buffer; longer rows are not stored"
        )

    def __init__(self, options: Any, student: Shape, teachers: Mapping[str, Shape]) -> None:
        super().__init__(options, student, teachers)
        capacity = options.replay_capacity
        self.register_buffer("rows", torch.zeros(capacity, options.replay_width, dtype=torch.int32))
        self.register_buffer("sizes", torch.zeros(capacity, 2, dtype=torch.int32))
        """of every row: tokens of the prompt, tokens in all"""
        self.register_buffer("stored", torch.zeros((), dtype=torch.int64))
        """rows stored so far, those that were overwritten too"""
        self.register_buffer("controller", torch.tensor([options.first_threshold, math.inf]))
        """phi, and the loss that it was set by"""
        self._chosen: tuple[int, Source] = (-1, "data")

    def source(self, step: Step) -> Source:
        """What a step learns from."""
        draw = float(uniform(1, step.seed, step.number))
        threshold, stored = float(self.get_buffer("controller")[0]), int(self.get_buffer("stored"))
        share = {"decreasing": 1 - step.share, "increasing": step.share, "constant": 0.5}[self.options.replay]
        full = stored >= self.options.replay_capacity
        if draw < threshold * share or (draw < threshold and not full):
            return "student"
        return "replay" if draw < threshold else "data"

    def make_batch(self, step: Step, batch: Batch, generate: Generate) -> Batch:
        """The batch, prompts with continuations, or rows of the replay buffer."""
        if self._chosen[0] != step.number:  # once per step: the buffer grows with every micro-batch
            self._chosen = (step.number, self.source(step))
        if self._chosen[1] == "data":
            return batch
        if self._chosen[1] == "replay":
            return self.replayed(step, batch).batch(batch)

        def sampler(student: Any, teachers: Mapping[str, Any]) -> Written:
            (teacher,) = teachers.values()
            return write(batch, self.options, step, student, teacher)[0]

        made = generate(sampler)
        self.store(made, generate)
        return made.batch(batch)

    def store(self, made: Written, generate: Generate) -> None:
        """Put the rows of all processes into the buffer, in order, over the oldest."""
        width, capacity = self.options.replay_width, self.options.replay_capacity
        flat = torch.zeros(len(made.ids), width + 2, dtype=torch.int32, device=made.ids.device)
        flat[:, 0], flat[:, 1] = made.prompts, made.lengths
        common = min(width, made.ids.shape[1])
        flat[:, 2 : 2 + common] = made.ids[:, :common]
        new = generate.gather(flat)
        new = new[(new[:, 1] <= width) & (new[:, 1] > new[:, 0])]
        stored = self.get_buffer("stored")
        places = (torch.arange(len(new), device=new.device) + stored.to(new.device)) % capacity
        last = max(0, len(new) - capacity)
        self.get_buffer("sizes")[places[last:]] = new[last:, :2]
        self.get_buffer("rows")[places[last:]] = new[last:, 2:]
        stored += len(new)

    def replayed(self, step: Step, batch: Batch) -> Written:
        """As many rows of the buffer as the micro-batch has documents, drawn with replacement."""
        numbers = Prompts.of(batch, 1)
        count = min(int(self.get_buffer("stored")), self.options.replay_capacity)
        places = (numbers.uniforms(step, 1, stream=2)[:, 0] * count).long()
        sizes = self.get_buffer("sizes")[places].long()
        ids = self.get_buffer("rows")[places, : int(sizes[:, 1].max())].long()
        return Written(ids, sizes[:, 0], sizes[:, 1], numbers.numbers)

    def logged(self) -> dict[str, Tensor]:
        """phi, and whether the step sampled."""
        sampled = torch.tensor(float(self._chosen[1] == "student"))
        return {"sampling_threshold": self.get_buffer("controller")[0].clone(), "sampled_steps": sampled}

    def after_evaluate(self, step: Step, metrics: Mapping[str, float]) -> None:
        """Raise phi where the loss has risen."""
        controller = self.get_buffer("controller")
        loss, before = metrics["loss"], float(controller[1])
        if math.isinf(before):
            controller[1] = loss
        elif loss >= before + self.options.loss_tolerance:
            controller[0] = min(1.0, float(controller[0]) + 0.1)
            controller[1] = loss
