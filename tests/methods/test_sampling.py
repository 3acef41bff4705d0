"""Continuations against a loop that samples row by row, without a cache and without padding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Step
from kdtrain.methods.sampling import Prompts, SamplingOptions, Written, uniform, write
from kdtrain.outputs import IGNORED, Batch
from tests.language.conftest import tiny
from tests.language.test_objective import CPU, rows

OPTIONS = SamplingOptions(name="-", max_new_tokens=6, prompt_tokens=3)
STEP = Step(number=4, total=9, seed=2)


def batch_of(*index: int, packing: bool = False) -> Batch:
    """Rows of several documents or of one."""
    data = rows(packing=packing)
    return data.batch(torch.tensor(index or range(len(data))), CPU)


def continuation_of(made: Written, row: int) -> list[int]:
    return made.ids[row, int(made.prompts[row]) : int(made.lengths[row])].tolist()


def by_inversion(logits: Tensor, number: float) -> int:
    """The first token whose cumulated probability exceeds a number."""
    total = 0.0
    for token, p in enumerate(logits.double().softmax(0).tolist()):
        total += p
        if total > number:
            return token
    return len(logits) - 1


@torch.no_grad()
def one_by_one(model: Any, prompts: Prompts, options: SamplingOptions, step: Step) -> list[list[int]]:
    """The continuation of every prompt."""
    found = []
    for row in range(len(prompts.ids)):
        ids = prompts.ids[row][prompts.mask[row] == 1].tolist()
        start, numbers = len(ids), uniform(options.max_new_tokens, step.seed, step.number, *prompts.numbers[row].tolist(), 0)  # fmt: skip
        for number in numbers.tolist():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            ids.append(by_inversion(logits / options.sampling_temperature, number))
            if ids[-1] == model.config.eos_token_id:
                break
        found.append(ids[start:])
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "cohere"])
@pytest.mark.parametrize("packing", [False, True])
def test_tokens_are_those_of_a_plain_loop(family: str, packing: bool) -> None:
    model, batch = tiny(family), batch_of(packing=packing)
    options = OPTIONS.model_copy(update={"sampling_temperature": 0.7})
    made, tally = write(batch, options, STEP, model, None)
    assert len(made.ids) == 8, "every document is a row"
    expected = one_by_one(model, Prompts.of(batch, 3), options, STEP)
    assert [continuation_of(made, row) for row in range(8)] == expected
    assert tally.tolist() == [sum(map(len, expected))] * 2


def test_a_row_ends_with_the_end_token() -> None:
    model = tiny("llama")
    plain, _ = write(batch_of(), OPTIONS, STEP, model, None)
    end = continuation_of(plain, 0)[2]
    model.config.eos_token_id = [end, 299]
    made, _ = write(batch_of(), OPTIONS, STEP, model, None)
    for row in range(8):
        before = continuation_of(plain, row)
        stop = before.index(end) + 1 if end in before else len(before)
        assert continuation_of(made, row) == before[:stop]


def test_draws_depend_on_step_seed_and_row_alone() -> None:
    model = tiny("llama")

    def tokens(step: Step, *index: int) -> list[list[int]]:
        made, _ = write(batch_of(*index), OPTIONS, step, model, None)
        return [continuation_of(made, row) for row in range(len(made.ids))]

    whole = tokens(STEP, *range(8))
    torch.manual_seed(99)
    assert tokens(STEP, 0, 1, 2) + tokens(STEP, 3, 4, 5, 6, 7) == whole
    assert tokens(Step(number=5, total=9, seed=2), *range(8)) != whole
    assert tokens(Step(number=4, total=9, seed=3), *range(8)) != whole


def test_only_continuations_count() -> None:
    batch = batch_of()
    made, _ = write(batch, OPTIONS, STEP, tiny("llama"), None)
    new = made.batch(batch)
    for row in range(8):
        start, end = int(made.prompts[row]), int(made.lengths[row])
        counted = (new.labels[row] != IGNORED).nonzero().flatten().tolist()
        assert counted == list(range(start - 1, end - 1))
        assert new.labels[row, counted].tolist() == continuation_of(made, row)
    assert bool((new.input_ids[new.positions >= made.lengths[:, None]] == 0).all()), "padding is on the right"


def test_prompts_of_the_data_are_kept_whole() -> None:
    data = rows(packing=True, masked=2)
    prompts = Prompts.of(data.batch(torch.arange(len(data)), CPU), 1)
    assert sorted(prompts.lengths.tolist()) == [2] * 7, "the document of two tokens has no label"


def test_no_row_is_longer_than_a_model_reads() -> None:
    student, teacher = tiny("gpt2", n_positions=8), tiny("llama")
    made, _ = write(batch_of(), OPTIONS, STEP, student, teacher)
    assert int(made.lengths.max()) == 8


def test_no_token_is_drawn_that_the_teacher_does_not_have() -> None:
    student, teacher = tiny("llama", vocab_size=300), tiny("llama", vocab_size=20)
    made, _ = write(batch_of(), OPTIONS, STEP, student, teacher)
    assert all(token < 20 for row in range(8) for token in continuation_of(made, row))


def test_the_nucleus_is_respected() -> None:
    model, batch = tiny("llama"), batch_of()
    options = OPTIONS.model_copy(update={"sampling_top_p": 1e-6})
    made, _ = write(batch, options, STEP, model, None)
    ids = made.ids[0, : int(made.lengths[0])]
    best = model(input_ids=ids[None]).logits[0].argmax(1)
    start = int(made.prompts[0])
    assert ids[start:].tolist() == best[start - 1 : -1].tolist()


def test_a_student_without_an_end_token_is_refused() -> None:
    model = tiny("llama")
    model.config.eos_token_id = None
    with pytest.raises(KdtrainError, match=r"no end-of-text token to stop sampling at; set eos_token_id"):
        write(batch_of(), OPTIONS, STEP, model, None)
