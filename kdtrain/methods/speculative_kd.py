"""Speculative KD (Xu et al., ICLR 2025, arXiv 2410.11325): the student writes, and the teacher replaces unlikely tokens."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdtrain.methods.base import Generate, Step
from kdtrain.methods.sampling import (
    Judge,
    Nucleus,
    OnPolicy,
    Positive,
    Prompts,
    SamplingOptions,
    Writer,
    Written,
    write,
)
from kdtrain.outputs import Batch
from kdtrain.recipe.base import POSITIVE, Whole


class SpeculativeDistillation(OnPolicy):
    """The terms of kd on rows of which `y_i ~ p_s(. | y_<i)`, or `y_i ~ p_t(. | y_<i)` where y_i is outside of the top-k of p_t.

    The student drafts blocks of tokens and one pass of the teacher reads a block. The block size changes the cost and not
    the tokens: each has a random number of its own. A `top_k` of the whole vocabulary is on-policy distillation; 1 is close
    to sequences of the teacher. Defaults are those of the authors' code; the text of the paper was not at hand.
    """

    class Options(SamplingOptions):
        """Soft labels on continuations that student and teacher write together."""

        name: Literal["speculative_kd"] = "speculative_kd"
        sampling_temperature: Positive = Field(
            default=0.5, description="temperature at which the student samples"
        )
        sampling_top_p: Nucleus = Field(
            default=0.5,
            description="the student samples from the likeliest tokens with this total probability",
        )
        top_k: Annotated[Whole, POSITIVE] = Field(
            default=25, description="a token of the student stays if it is among this many of the teacher"
        )
        block_tokens: Annotated[Whole, POSITIVE] = Field(
            default=5, description="tokens that the student writes before the teacher reads them"
        )
        teacher_sampling_temperature: Positive = Field(
            default=0.2, description="temperature at which the teacher samples"
        )
        teacher_sampling_top_p: Nucleus = Field(
            default=0.5,
            description="the teacher samples from the likeliest tokens with this total probability",
        )

    def make_batch(self, step: Step, batch: Batch, generate: Generate) -> Batch:
        """Prompts with continuations of both."""
        options = self.options
        if self._step != step.number:
            self._step, self._tally = step.number, torch.zeros(2, device=batch.input_ids.device)

        def sampler(student: Any, teachers: Mapping[str, Any]) -> tuple[Written, Tensor]:
            (teacher,) = teachers.values()

            def judge(prompts: Prompts, vocabulary: int) -> Judge:
                uniforms = prompts.uniforms(step, options.max_new_tokens, stream=1)
                writer = Writer(
                    teacher,
                    options.teacher_sampling_temperature,
                    options.teacher_sampling_top_p,
                    uniforms,
                    vocabulary,
                    autocast=False,
                )
                return Judge(writer, options.top_k, options.block_tokens)

            return write(batch, options, step, student, teacher, judge)

        made, tally = generate(sampler)
        self._tally = self._tally + generate.gather(tally[None].float()).sum(0)
        return made.batch(batch)

    _step = -1

    def logged(self) -> dict[str, Tensor]:
        """The share of tokens that the teacher left as the student wrote them."""
        return {"accepted_tokens": self._tally[0] / self._tally[1].clamp_min(1)}
