"""Speculative KD (arXiv 2410.11325): tokens against a loop that takes one at a time, without a cache or a block."""

from typing import Any

import pytest
import torch
from transformers import TopPLogitsWarper

from kdtrain.methods import method_class
from kdtrain.methods.base import Method, Step
from kdtrain.methods.sampling import Prompts, uniform
from kdtrain.outputs import Batch
from kdtrain.tasks.code_lm.task import shape_of
from tests.language.conftest import tiny
from tests.methods.test_sampling import STEP, batch_of, by_inversion

NEW = 7


def built(name: str, **options: Any) -> Method:
    kind = method_class(name)
    shape = shape_of(tiny("llama"))
    return kind(
        kind.Options(**{"max_new_tokens": NEW, "prompt_tokens": 3, **options}), shape, {"teacher": shape}
    )


class Here:
    """`generate` of one process."""

    def __init__(self, student: Any, teacher: Any) -> None:
        self.student, self.teacher = student, teacher

    def __call__(self, sampler: Any) -> Any:
        with torch.no_grad():
            return sampler(self.student, {"teacher": self.teacher})

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values


def tokens(made: Batch) -> list[list[int]]:
    """The counted tokens of every row."""
    return [row[row >= 0].tolist() for row in made.labels]


@torch.no_grad()
def one_by_one(student: Any, teacher: Any, prompts: Prompts, top_k: int) -> tuple[list[list[int]], int]:
    """Every continuation, and how many tokens the teacher left alone."""
    found, accepted = [], 0
    for row in range(len(prompts.ids)):
        ids = prompts.ids[row][prompts.mask[row] == 1].tolist()
        start, key = len(ids), (STEP.seed, STEP.number, *prompts.numbers[row].tolist())
        ours, theirs = uniform(NEW, *key, 0).tolist(), uniform(NEW, *key, 1).tolist()
        for place in range(NEW):
            drafts, known = (
                model(input_ids=torch.tensor([ids])).logits[0, -1].float() for model in (student, teacher)
            )
            token = by_inversion(TopPLogitsWarper(0.9)(None, drafts[None] / 0.8)[0], ours[place])  # type: ignore[arg-type]
            if token in known.topk(top_k).indices.tolist():
                accepted += 1
            else:
                token = by_inversion(TopPLogitsWarper(0.6)(None, known[None] / 1.3)[0], theirs[place])  # type: ignore[arg-type]
            ids.append(token)
            if token == student.config.eos_token_id:
                break
        found.append(ids[start:])
    return found, accepted


@pytest.mark.parametrize("top_k", [1, 120, 300])
@pytest.mark.parametrize("block", [1, 3, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_interleaved_sampling_2410_11325(family: str, block: int, top_k: int) -> None:
    student, teacher = tiny(family), tiny("qwen2", 1, hidden_size=48)
    batch = batch_of(packing=True)
    method = built(
        "speculative_kd", top_k=top_k, block_tokens=block, sampling_temperature=0.8, sampling_top_p=0.9,
        teacher_sampling_temperature=1.3, teacher_sampling_top_p=0.6,
    )  # fmt: skip
    made = method.make_batch(STEP, batch, Here(student, teacher))
    expected, accepted = one_by_one(student, teacher, Prompts.of(batch, 3), top_k)
    assert tokens(made) == expected
    share = accepted / sum(map(len, expected))
    assert float(method.logged()["accepted_tokens"]) == pytest.approx(share)
    assert top_k != 120 or 0.1 < share < 0.9, "both sides wrote"


def test_rows_end_at_the_end_token() -> None:
    student, teacher = tiny("llama"), tiny("qwen2", 1, hidden_size=48)
    batch = batch_of()
    free = tokens(built("speculative_kd", block_tokens=4).make_batch(STEP, batch, Here(student, teacher)))
    end = free[0][1]
    student.config.eos_token_id = end
    made = tokens(built("speculative_kd", block_tokens=4).make_batch(STEP, batch, Here(student, teacher)))
    assert made == [row[: row.index(end) + 1] if end in row else row for row in free]


def test_the_share_is_over_the_micro_batches_of_a_step() -> None:
    student, teacher = tiny("llama"), tiny("qwen2", 1, hidden_size=48)
    whole, split = (built("speculative_kd", top_k=120, sampling_temperature=1.0) for _ in range(2))
    whole.make_batch(STEP, batch_of(), Here(student, teacher))
    for index in ((0, 1, 2), (3, 4, 5, 6, 7)):
        split.make_batch(STEP, batch_of(*index), Here(student, teacher))
    share = float(whole.logged()["accepted_tokens"])
    assert float(split.logged()["accepted_tokens"]) == pytest.approx(share)
    split.make_batch(Step(5, 9, seed=2), batch_of(0), Here(student, teacher))
    assert float(split.logged()["accepted_tokens"]) != pytest.approx(share), "a new step counts anew"
