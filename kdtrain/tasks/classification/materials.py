"""What runs of one process may share: data, teacher, tokens. A run alone makes its own; a study hands one on."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

from transformers import PreTrainedTokenizerBase

from kdtrain.models.teachers import Teacher
from kdtrain.recipe import Recipe
from kdtrain.tasks.classification.pairs import Rows, tokenize_split
from kdtrain.tasks.classification.prepare import open_teacher, student_insert
from kdtrain.tasks.classification.rows import TextRows
from kdtrain.tasks.classification.splits import ClassificationData, load_classification

Made = TypeVar("Made")


class Materials:
    """Makes each thing once. Files are taken not to change in its lifetime."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What was made under this key, or what `make` makes now."""
        if key not in self._made:
            self._made[key] = make()
        return cast(Made, self._made[key])

    def data(self, recipe: Recipe) -> ClassificationData:
        """The recipe's data set."""
        return self.once(("data", recipe.data), lambda: load_classification(recipe.data))

    def teacher(self, recipe: Recipe) -> Teacher | None:
        """The recipe's teacher, if it names one."""
        return self.once(
            ("teacher", recipe.data, recipe.teacher), lambda: open_teacher(recipe, self.data(recipe))
        )

    def tokens(self, recipe: Recipe, name: str, split: TextRows, tokenizer: PreTrainedTokenizerBase) -> Rows:
        """A split in the student's tokens; kept where the recipe names a finished tokenizer."""
        student, focus = recipe.student, self.data(recipe).focus
        insert = student_insert(student, tokenizer)

        def make() -> Rows:
            return tokenize_split(split, tokenizer, student.max_length, focus, insert)

        if student.tokenizer is None:
            return make()
        return self.once(("tokens", recipe.data, name, student.tokenizer, student.max_length, insert), make)
