"""Which tokens of two vocabularies are the same, found by comparing them one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdtrain.errors import KdtrainError


@dataclass(frozen=True)
class VocabularyMatch:
    """How a student's head lines up with a teacher's."""

    shared: int
    """ids 0 to shared - 1 mean the same token on both sides"""
    student_size: int
    """V_s, the rows of the student's head"""
    teacher_size: int
    """V_t, the rows of the teacher's head"""

    @property
    def vocab_map(self) -> "str | Tensor | None":
        """What `linear_kd_loss` wants: nothing for equal heads, the shared prefix, or each student token's teacher id."""
        if self.student_size == self.teacher_size == self.shared:
            return None
        if self.shared == min(self.student_size, self.teacher_size):
            return "shared_prefix"
        ids = torch.arange(self.student_size)
        return torch.where(ids < self.shared, ids, -1)


def match_vocabularies(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_size: int,
    teacher_size: int,
    samples: tuple[str, ...] = (),
) -> VocabularyMatch:
    """Compare two tokenizers token by token over the ids that both heads have.

    Rows of a head behind its tokenizer's last token are padding. Where both sides have padding for the same id, the id
    is no token of either and counts as shared: both models learned to give it nothing. Where only one side has a
    token, the shared ids end.

    Args:
        student_size, teacher_size: rows of the heads, V_s and V_t.
        samples: texts that both must cut into the same tokens.

    Raises:
        KdtrainError: an id below the shared end is another token on the other side, or a text is cut otherwise.
    """
    names, others = (
        {i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (student, teacher)
    )
    shared = min(student_size, teacher_size)
    for i in range(shared):
        ours, theirs = names.get(i), others.get(i)
        if ours == theirs:
            continue
        if ours is None or theirs is None:
            shared = i
            break
        raise KdtrainError(
            f"the tokenizers of student and teacher differ: id {i} is {ours!r} for the student and {theirs!r} for the "
            "teacher, so their distributions cannot be compared; give the student the teacher's tokenizer "
            "(student.tokenizer) or train it on labels only (method.name: ft)"
        )
    for text in samples:
        ours, theirs = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher)
        )
        if ours != theirs:
            raise KdtrainError(
                "the tokenizers of student and teacher have the same tokens but cut text differently, for example "
                f"{text[:40]!r}; give the student the teacher's tokenizer (student.tokenizer)"
            )
    return VocabularyMatch(shared, student_size, teacher_size)


def check_ids(
    documents: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase, models: Mapping[str, PreTrainedModel]
) -> None:
    """Refuse documents with tokens for which a model has no embedding, such as those added for the student alone.

    Args:
        documents: token ids of the training documents and of the held-out ones.
        models: by side, `student` and perhaps `teacher`.
    """
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    for side, model in models.items():
        table = model.get_input_embeddings().weight
        assert isinstance(table, Tensor)
        size = len(table)
        if max(names) < size:
            continue
        for tokens in documents:
            beyond = tokens[tokens >= size]
            if len(beyond):
                raise KdtrainError(
                    f"the documents hold {len(beyond)} tokens that the {side} cannot read: the first is {int(beyond[0])} "
                    f"({names.get(int(beyond[0]))!r}), its embeddings end at {size - 1}; choose a student.tokenizer without "
                    "them, or leave such documents out"
                )
