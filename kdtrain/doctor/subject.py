"""What the checks of a classification run look at: a recipe, and all it names, opened when first asked for."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdtrain.methods.base import Method
from kdtrain.models.loading import load_tokenizer
from kdtrain.models.teachers import Teacher
from kdtrain.models.tokenizers import train_tokenizer
from kdtrain.recipe import ClassificationRecipe
from kdtrain.tasks.base import SharedInputs
from kdtrain.tasks.classification.pairs import Rows, tokenize_split
from kdtrain.tasks.classification.rows import TextRows
from kdtrain.tasks.classification.splits import ClassificationData
from kdtrain.tasks.classification.task import Classification
from kdtrain.tasks.classification.teacher_outputs import teacher_outputs

SAMPLE = 200
"""Rows that a check looks at where looking costs a model's time."""
CPU = torch.device("cpu")


@dataclass
class Subject:
    """A recipe with everything it names, opened when a check first asks for it."""

    recipe: ClassificationRecipe
    shared: SharedInputs = field(default_factory=SharedInputs)
    """data and teacher, and what was made of them; subjects of one study share it"""

    @cached_property
    def task(self) -> Classification:
        """The run."""
        return Classification(self.recipe, self.shared)

    @property
    def data(self) -> ClassificationData:
        """The data set."""
        return self.task.data

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, if the recipe names one."""
        return self.task.teacher

    @property
    def methods(self) -> list[Method]:
        """The methods, told the shapes of both sides."""
        return self.task.methods

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer, or one like it, trained on a part of the rows."""
        given = self.recipe.student.tokenizer or self.recipe.student.path
        if given is not None:
            return load_tokenizer(
                given, "student.tokenizer" if self.recipe.student.tokenizer else "student.path"
            )
        student = self.recipe.student

        def make() -> PreTrainedTokenizerBase:
            return train_tokenizer(
                self.data.train.all_texts()[: 10 * SAMPLE],
                vocab_size=student.vocab_size,
                max_length=student.max_length,
                focus=self.data.focus,
            )

        key = ("a tokenizer like the student's", self.recipe.data, student.vocab_size, student.max_length)
        return self.shared.once(key, make)

    @cached_property
    def sample(self) -> TextRows:
        """Some validation rows, spread evenly."""
        count = len(self.data.valid)
        return self.data.valid.select(torch.linspace(0, count - 1, min(SAMPLE, count)).long().tolist())

    def student_rows(self, limit: int | None = None) -> Rows:
        """The sample in the student's tokens."""
        student = self.recipe.student
        insert = self.task.inserted(self.tokenizer)
        return tokenize_split(
            self.sample, self.tokenizer, limit or student.max_length, self.data.focus, insert
        )

    def teacher_rows(self, limit: int | None = None) -> Rows:
        """The sample in the teacher's tokens."""
        assert self.teacher is not None
        return tokenize_split(
            self.sample,
            self.teacher.tokenizer,
            limit or self.teacher.max_length,
            self.data.focus,
            self.teacher.insert,
        )

    @cached_property
    def teacher_logits(self) -> Tensor:
        """What the teacher says of the sample."""
        teacher = self.teacher
        assert teacher is not None

        def ask() -> Tensor:
            rows = self.teacher_rows()
            return torch.cat(
                [
                    teacher_outputs(teacher, rows, index[None], (), CPU).logits
                    for index in torch.arange(len(rows))
                ]
            )

        return self.shared.once(("the teacher's answers", self.recipe.data, self.recipe.teacher), ask)
