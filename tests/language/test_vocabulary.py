"""Vocabularies are compared token by token; a padded head is fine, another tokenizer is not."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kdtrain.errors import KdtrainError
from kdtrain.models.vocabulary import match_vocabularies


def words(*names: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0])
        ),
        unk_token=names[0],
    )


def test_padded_heads_of_one_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    size = len(tokenizer)
    assert match_vocabularies(tokenizer, tokenizer, size, size).vocab_map is None
    assert match_vocabularies(tokenizer, tokenizer, size + 20, size + 20).vocab_map is None
    found = match_vocabularies(tokenizer, copy.deepcopy(tokenizer), size + 5, size + 90)
    assert found.vocab_map == "shared_prefix" and found.shared == size + 5


def test_tokens_of_one_side_only_are_not_shared() -> None:
    student, teacher = words("a", "b", "c"), words("a", "b", "c", "d")
    found = match_vocabularies(student, teacher, 6, 8)
    assert found.shared == 3
    assert torch.equal(found.vocab_map, torch.tensor([0, 1, 2, -1, -1, -1]))  # type: ignore[arg-type]


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(KdtrainError, match=r"id 1 is 'b' for the student and 'c' for the teacher"):
        match_vocabularies(words("a", "b"), words("a", "c"), 2, 2)


def test_other_cuts_of_the_same_tokens_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    with pytest.raises(KdtrainError, match=r"cut text differently, for example 'Def X'"):
        match_vocabularies(tokenizer, other, 300, 300, ("def f", "Def X"))
