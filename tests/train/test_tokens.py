"""Tokens: the focus window, padding, and batches as a function of seed and epoch."""

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from kdtrain.data.tokens import (
    epoch_batches,
    special_affixes,
    token_budget_batches,
    tokenize,
    window_start,
)
from kdtrain.models.tokenizers import train_tokenizer
from tests.train.conftest import FOCUS

TEXT = "def f(a):\n    return a + 1\n"


@pytest.fixture(scope="module")
def student() -> PreTrainedTokenizerBase:
    """Knows the marker as one token."""
    return train_tokenizer([TEXT, f"x = {FOCUS} + 1"] * 4, vocab_size=300, max_length=16, focus=FOCUS)


@pytest.fixture(scope="module")
def teacher() -> PreTrainedTokenizerBase:
    """Another vocabulary, in which the marker is ordinary text."""
    return train_tokenizer([TEXT, "total = total + value"] * 9, vocab_size=340, max_length=16)


def long_row(before: int, after: int) -> str:
    return "a " * before + FOCUS + " b" * after


def test_trained_tokenizer_is_a_roberta_byte_bpe(student: PreTrainedTokenizerBase) -> None:
    assert student.convert_ids_to_tokens([0, 1, 2, 3, 4, 5]) == [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
        FOCUS,
    ]
    text = f"if é:\n\tx = '{chr(0x1F600)}' # {FOCUS}"
    assert student.decode(student(text, add_special_tokens=False)["input_ids"]) == text
    assert special_affixes(student) == ([0], [2])
    merged = [token for token in student.get_vocab() if "HOLE" in token]
    assert merged == [FOCUS]  # the marker gave no material for merges


def test_pairs_seen_once_are_no_tokens() -> None:
    tokenizer = train_tokenizer(["zq"], vocab_size=400, max_length=16)
    assert "zq" not in tokenizer.get_vocab()
    assert "zq" in train_tokenizer(["zq zq", "zq"], vocab_size=400, max_length=16).get_vocab()


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 2), (40, 40), (60, 0), (0, 60), (5, 60)])
def test_window_holds_the_focus(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, before: int, after: int
) -> None:
    text = long_row(before, after)
    rows = tokenize([text], student, 16, FOCUS)
    ids = rows.batch(torch.tensor([0]))[0][0].tolist()
    assert len(ids) <= 16 and (ids[0], ids[-1]) == (0, 2)
    assert student.convert_tokens_to_ids(FOCUS) in ids
    # The teacher spells the marker out; its first pieces must be inside its own window.
    seen = teacher.decode(tokenize([text], teacher, 16, FOCUS).batch(torch.tensor([0]))[0][0][1:-1])
    assert "__H" in seen


def test_window_is_sixty_to_forty(student: PreTrainedTokenizerBase) -> None:
    assert window_start(length=100, budget=10, place=50) == 44
    ids = tokenize([long_row(200, 200)], student, 52, FOCUS).batch(torch.tensor([0]))[0][0].tolist()
    assert ids.index(student.convert_tokens_to_ids(FOCUS)) == 1 + 30


def test_without_focus_the_head_is_kept(student: PreTrainedTokenizerBase) -> None:
    text = long_row(200, 200)
    whole = student(text, add_special_tokens=False)["input_ids"]
    for focus, row in ((None, text), (FOCUS, text.replace(FOCUS, ""))):
        ids = tokenize([row], student, 16, focus).batch(torch.tensor([0]))[0][0].tolist()
        assert ids[1:-1] == whole[:14]


def test_student_and_teacher_tokenize_each_row_themselves(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    ours, theirs = (
        tokenize(["total = total + value"], tokenizer, 64).lengths.item() for tokenizer in (student, teacher)
    )
    assert ours != theirs


def test_padding_is_dynamic_and_on_the_right(student: PreTrainedTokenizerBase) -> None:
    student.padding_side = "left"  # a tokenizer's own side must not matter
    rows = tokenize(["a", "a b c", "a b c d e f"], student, 16)
    student.padding_side = "right"
    ids, mask = rows.batch(torch.tensor([1, 0]))
    assert ids.shape == (2, int(rows.lengths[1]))
    assert mask[1].tolist() == [1] * int(rows.lengths[0]) + [0] * int(rows.lengths[1] - rows.lengths[0])
    assert set(ids[mask == 0].tolist()) == {1}  # <pad>
    assert ids[1][mask[1] == 1].tolist() == student("a")["input_ids"]


def test_epoch_batches_are_a_function_of_seed_and_epoch() -> None:
    lengths = torch.randint(3, 200, (1003,))
    batches = epoch_batches(lengths, 16, seed=1, epoch=2)
    torch.manual_seed(99)
    again = epoch_batches(lengths, 16, seed=1, epoch=2)
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]
    assert sorted(torch.cat(batches).tolist()) == list(range(1003))
    assert len(batches) == 63
    other = epoch_batches(lengths, 16, seed=1, epoch=3)
    assert [batch.tolist() for batch in batches] != [batch.tolist() for batch in other]
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    shuffled = sum(int(part.max()) * len(part) for part in lengths.split(16))
    assert padded < 0.7 * shuffled


def test_token_budget_batches_respect_the_budget() -> None:
    lengths = torch.randint(3, 200, (300,))
    batches = token_budget_batches(lengths, 1000)
    assert sorted(torch.cat(batches).tolist()) == list(range(300))
    assert all(int(lengths[batch].max()) * len(batch) <= 1000 for batch in batches)
    assert [batch.tolist() for batch in token_budget_batches(torch.tensor([5000]), 1000)] == [[0]]
