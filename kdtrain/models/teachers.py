"""Teachers of a classification task: any trained classifier, its outputs brought into the order of the task's classes."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdtrain.data.tokens import inserted_ids
from kdtrain.errors import KdtrainError
from kdtrain.models.loading import (
    load_classifier,
    load_config,
    load_tokenizer,
    positions_of,
    tokenizer_hash,
    weights_hash,
)
from kdtrain.models.pair_checkpoint import holds_a_pair_head, load_pair_checkpoint
from kdtrain.models.pair_config import PairConfig
from kdtrain.models.pairs import PairForSequenceClassification
from kdtrain.recipe import TeacherSection

LONGEST_DEFAULT = 512


@dataclass(frozen=True)
class Teacher:
    """A frozen classifier in eval mode with its own tokenizer."""

    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    order: tuple[int, ...] | None = None
    """which of its outputs is each class of the task; None: they stand in the task's order"""
    insert: tuple[int, ...] = ()
    """ids behind the first token of every row"""

    @property
    def classes(self) -> int:
        """C, the width of its class logits."""
        return max(int(self.model.config.num_labels or 0), 2)

    @property
    def pairs(self) -> bool:
        """Whether it classifies pairs of texts."""
        return isinstance(self.model, PairForSequenceClassification)

    def class_logits(self, outputs: Tensor) -> Tensor:
        """(B, C) logits in the task's order. One output is the log-odds of the second class: softmax([0, z])."""
        if outputs.shape[1] == 1:
            outputs = torch.cat([torch.zeros_like(outputs), outputs], dim=1)
        return outputs if self.order is None else outputs[:, list(self.order)]

    def outputs_hash(self) -> str:
        """What its outputs depend on beside weights and tokenizer."""
        inserted = f"{list(self.insert)}, without their states" if self.insert else "[]"
        return f"{list(self.order or ())} {inserted}"

    def weights_hash(self) -> str:
        """Of its model, see `kdtrain.models.loading.weights_hash`."""
        return weights_hash(self.model)

    def tokenizer_hash(self) -> str:
        """Of its tokenizer, see `kdtrain.models.loading.tokenizer_hash`."""
        return tokenizer_hash(self.tokenizer)


def load_teacher(
    path: str, classes: tuple[str, ...], recipe: TeacherSection | None = None, *, pairs: bool = False
) -> Teacher:
    """Load a frozen teacher in float32 and check that its classes are the task's.

    Args:
        path: folder or hub id of a sequence classifier; a one-logit head serves a task of two classes.
        classes: the task's class names, in order.
        recipe: max_length, class_order and insert of the teacher section.
        pairs: the task is one over pairs; the checkpoint is one of ours, or an encoder with CodeXGLUE's pair head.

    Raises:
        KdtrainError: it cannot be loaded, has no trained head, or other classes or another order of them.
    """
    recipe = recipe or TeacherSection()
    model = _load_pair(path, len(classes)) if pairs else _load_single(path)
    outputs = int(model.config.num_labels or 0)
    if outputs != len(classes) and not (outputs == 1 and len(classes) == 2):
        raise KdtrainError(f"the teacher {path} has {outputs} classes, the data set {len(classes)}")
    if recipe.class_order:
        if sorted(recipe.class_order) != list(range(len(classes))):
            raise KdtrainError(
                f"teacher.class_order must name each of the outputs 0 to {len(classes) - 1} once, got "
                f"{list(recipe.class_order)}"
            )
    elif outputs == len(classes):
        id2label: dict[Any, str] = dict(model.config.id2label or {})
        named = [str(id2label[i]) for i in range(len(classes))]
        if named != list(classes) and not all(name == f"LABEL_{i}" for i, name in enumerate(named)):
            i = next(i for i, (a, b) in enumerate(zip(named, classes, strict=True)) if a != b)
            raise KdtrainError(
                f"class {i} of the teacher {path} is {named[i]!r}, of the data set {classes[i]!r}; "
                "set teacher.class_order if only the order differs"
            )
    model.eval().requires_grad_(False)
    tokenizer = load_tokenizer(path, "teacher.path")
    insert = inserted_ids(tokenizer, recipe.insert, "teacher.insert", path)
    teacher = Teacher(path, model, tokenizer, LONGEST_DEFAULT, tuple(recipe.class_order) or None, insert)
    return replace(teacher, max_length=_max_length(teacher, recipe.max_length))


def _load_pair(path: str, classes: int) -> PairForSequenceClassification:
    """A classifier of pairs: one saved by a run, or a folder with an encoder and CodeXGLUE's pair head."""
    config = load_config(path, "teacher.path")
    if isinstance(config, PairConfig):
        return load_classifier(path, "teacher.path")
    return load_pair_checkpoint(path, config, "teacher.path", {"num_labels": classes})


def _load_single(path: str) -> PreTrainedModel:
    config = load_config(path, "teacher.path")
    if isinstance(config, PairConfig) or holds_a_pair_head(path, int(getattr(config, "hidden_size", 0))):
        raise KdtrainError(
            f"the teacher {path} classifies pairs of texts, and the rows of this task are single texts"
        )
    return load_classifier(path, "teacher.path")


def _max_length(teacher: Teacher, wanted: int | None) -> int:
    longest = min(teacher.tokenizer.model_max_length, positions_of(teacher.model.config) or 1 << 30)
    if wanted is not None and wanted > longest:
        raise KdtrainError(
            f"teacher.max_length is {wanted}, but the teacher {teacher.path} reads at most {longest} tokens"
        )
    return wanted or min(longest, LONGEST_DEFAULT)
