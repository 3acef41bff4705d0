"""Task masked_lm: an encoder that learns code by predicting masked tokens, to become a teacher."""

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kdtrain.engine.checkpoint import Position
from kdtrain.engine.processes import main_process_first
from kdtrain.errors import KdtrainError
from kdtrain.files import atomic_folder, folder_bytes
from kdtrain.methods import build_methods
from kdtrain.methods.ft import FineTuning
from kdtrain.models.loading import (
    Shape,
    load_model,
    load_tokenizer,
    parameter_count,
    quiet,
    tokenizer_hash,
    weights_hash,
)
from kdtrain.models.masked_heads import check_masked_head
from kdtrain.models.students import check_positions, roberta_config
from kdtrain.models.tokenizers import stored_tokenizer, train_tokenizer
from kdtrain.objective import Objective
from kdtrain.recipe import MaskedRecipe
from kdtrain.tasks.base import Prepared, Task, TrainingData
from kdtrain.tasks.masked_lm.corpus import Corpus, load_corpus
from kdtrain.tasks.masked_lm.outputs import MaskedModels, masked_metrics
from kdtrain.tasks.masked_lm.rows import MaskedRows


class MaskedLM(Task[MaskedRecipe]):
    """One run of a masked language model."""

    name: ClassVar[str] = "masked_lm"

    @cached_property
    def corpus(self) -> Corpus:
        """The code."""
        return load_corpus(self.recipe.data)

    def identity(self) -> dict[str, str | None]:
        """Hashes of the code, and of what the recipe names of the student."""
        section = self.recipe.student
        named = section.path is not None or section.tokenizer is not None
        return {
            "data": self.corpus.fingerprint(),
            "weights at student.path": weights_hash(self.student.base_model) if section.path else None,
            "student's tokenizer": tokenizer_hash(self.tokenizer) if named else None,
        }

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the student; one that is trained is written into the folder of the run."""
        return corpus_tokenizer(self.recipe, self.corpus)

    @cached_property
    def student(self) -> PreTrainedModel:
        """The student."""
        tokenizer = self.tokenizer
        torch.manual_seed(self.recipe.seed)
        student = build_masked_student(self.recipe, tokenizer)
        check_masked_head(student)
        return student

    def rows(self, part: Any) -> MaskedRows:
        """One side of the code in tokens."""
        return self.corpus.rows(part, self.tokenizer, self.recipe.student.max_length, self.recipe.seed)

    def prepare(self, accelerator: Accelerator) -> Prepared:
        """Tokenizer, rows, student."""
        with main_process_first(accelerator):
            _ = self.tokenizer
        train, valid = (self.rows(part) for part in (self.corpus.train, self.corpus.valid))
        methods = build_methods([FineTuning.Options()], self.name, Shape(0, 0), {})
        return Prepared(Objective(self.student, methods, MaskedModels()), train, valid)

    def metrics(self, values: Tensor, data: TrainingData) -> dict[str, float]:
        """Of the held-out rows."""
        return masked_metrics(values)

    def final(
        self, prepared: Prepared, position: Position, folder: Path, accelerator: Accelerator
    ) -> dict[str, dict[str, Any]]:
        """The metrics of the best step as they were measured then; there are no rows that nothing was chosen by."""
        return {"valid": position.best_metrics} if accelerator.is_main_process else {}

    def save(self, prepared: Prepared, state: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        """The encoder with its head, and the tokenizer."""
        with quiet(), atomic_folder(folder / "student") as temporary:
            self.student.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
        return {
            "architecture": self.student.config.model_type,
            "parameters": parameter_count(self.student),
            "bytes": folder_bytes(folder / "student"),
        }

    def describe_data(self, prepared: Prepared) -> dict[str, Any]:
        """Names, content, rows and tokens."""
        sides = {"train": prepared.train, "valid": prepared.valid}
        return {
            "name": ", ".join(self.recipe.data.train) or "the code installed here",
            "fingerprint": self.corpus.fingerprint(),
            "rows": {name: len(rows.lengths) for name, rows in sides.items()},
            "tokens": {name: int(rows.lengths.sum()) for name, rows in sides.items()},
            **self.corpus.about,
        }


def corpus_tokenizer(recipe: MaskedRecipe, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The finished tokenizer that the recipe names, or one trained on the training code, kept for a resumed run."""
    section = recipe.student
    given = section.tokenizer or section.path
    field = "student.tokenizer" if section.tokenizer or given is None else "student.path"

    def make() -> PreTrainedTokenizerFast:
        return train_tokenizer(
            corpus.texts(),
            vocab_size=section.vocab_size,
            max_length=section.max_length,
            focus=corpus.marker,
        )

    if given is not None:
        tokenizer = load_tokenizer(given, field)
    else:
        tokenizer = stored_tokenizer(Path(recipe.output) / "checkpoints" / "tokenizer", make, field)
    if tokenizer.mask_token is None:
        raise KdtrainError(f"{field}: the tokenizer has no <mask>, which task masked_lm hides tokens with")
    if corpus.marker is not None and corpus.marker not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [corpus.marker]})
    return tokenizer


def build_masked_student(recipe: MaskedRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new encoder with random weights, or the one at `student.path`, under a masked-language-model head."""
    if recipe.student.path is None:
        config = roberta_config(recipe.student, tokenizer)
        return AutoModelForMaskedLM.from_config(config, trust_remote_code=False)
    model = load_model(AutoModelForMaskedLM, recipe.student.path, "student.path", new_head=True)
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    check_positions(model.config, recipe.student)
    return model
