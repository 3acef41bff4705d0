"""Task classification: rows of one or two texts with a class, learned from labels and a stored teacher."""

import copy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdtrain.data.tokens import inserted_ids
from kdtrain.engine.checkpoint import Position
from kdtrain.engine.processes import main_process_first
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.rows import measured_rows
from kdtrain.files import atomic_folder, folder_bytes, write_tensors
from kdtrain.methods import build_methods
from kdtrain.methods.base import Method
from kdtrain.models.loading import (
    Shape,
    load_config,
    load_tokenizer,
    parameter_count,
    quiet,
    shape_of,
    tokenizer_hash,
    weights_hash,
)
from kdtrain.models.students import build_student
from kdtrain.models.teachers import Teacher, load_teacher
from kdtrain.models.tokenizers import stored_tokenizer, train_tokenizer
from kdtrain.objective import Objective, teacher_layers
from kdtrain.outputs import IGNORED
from kdtrain.recipe import ClassificationRecipe
from kdtrain.tasks.base import Prepared, Task, TrainingData
from kdtrain.tasks.classification.labelled import LabelledRows
from kdtrain.tasks.classification.metrics import classification_metrics, latency_ms, report, save_predictions
from kdtrain.tasks.classification.outputs import Classifiers
from kdtrain.tasks.classification.pairs import Rows, tokenize_split
from kdtrain.tasks.classification.rows import TextRows
from kdtrain.tasks.classification.splits import ClassificationData, load_classification
from kdtrain.tasks.classification.teacher_outputs import TeacherRows, filled_store, prepare_work, store_spec
from kdtrain.teacher_cache.build import Prepare
from kdtrain.teacher_cache.store import Store, StoreSpec


class Classification(Task[ClassificationRecipe]):
    """One classification run."""

    name: ClassVar[str] = "classification"

    # ---- what the recipe names

    @cached_property
    def data(self) -> ClassificationData:
        """The data set."""
        section = self.recipe.data
        return self.shared.once(("data", section), lambda: load_classification(section))

    @cached_property
    def teacher(self) -> Teacher | None:
        """The teacher, if the recipe names one."""
        data, section = self.data, self.recipe.teacher
        path = section.path
        if path is None:
            return None
        return self.shared.once(
            ("teacher", self.recipe.data, section),
            lambda: load_teacher(path, data.classes, section, pairs=data.pairs),
        )

    @cached_property
    def methods(self) -> list[Method]:
        """The methods, told the shapes of both sides."""
        given = self.recipe.student
        if given.path is not None:
            student = shape_of(load_config(given.path, "student.path"))
        else:
            recurrent = given.architecture == "bigru"
            student = Shape(given.layers, given.hidden_size * (2 if recurrent else 1), not recurrent)
        teachers = {} if self.teacher is None else {"teacher": shape_of(self.teacher.model.config)}
        torch.manual_seed(self.recipe.seed)
        return build_methods(self.recipe.methods, self.name, student, teachers)

    @property
    def learns_from_teacher(self) -> bool:
        """Whether a method reads the teacher."""
        return any(method.teachers for method in self.methods)

    def identity(self) -> dict[str, str | None]:
        """Hashes of data, teacher, and what the recipe names of the student."""
        data, teacher, section = self.data, self.teacher, self.recipe.student
        if self.recipe.training.metric_for_best_model == "f1" and len(data.classes) != 2:
            raise KdtrainError(
                f"training.metric_for_best_model f1 is for two classes, and {data.name} has {len(data.classes)}; macro_f1 is for any"
            )
        _ = self.methods
        named = section.path is not None or section.tokenizer is not None
        return {
            "data": data.fingerprint(),
            "teacher": None if teacher is None else teacher.weights_hash(),
            "teacher's tokenizer": None if teacher is None else teacher.tokenizer_hash(),
            "weights at student.path": weights_hash(self.student.base_model) if section.path else None,
            "student's tokenizer": tokenizer_hash(self.tokenizer) if named else None,
        }

    @cached_property
    def student(self) -> PreTrainedModel:
        """The student."""
        tokenizer = self.tokenizer
        torch.manual_seed(self.recipe.seed)  # the same first weights whatever was drawn before
        return build_student(self.recipe.student, tokenizer, self.data.classes, pairs=self.data.pairs)

    # ---- rows

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The finished tokenizer that the recipe names, or one trained on the labelled training code."""
        section, data = self.recipe.student, self.data
        given = section.tokenizer or section.path
        if given is not None:
            return load_tokenizer(given, "student.tokenizer" if section.tokenizer else "student.path")

        def make() -> PreTrainedTokenizerFast:
            return train_tokenizer(
                data.train.all_texts() if data.pairs else data.train.texts,
                vocab_size=section.vocab_size,
                max_length=section.max_length,
                focus=data.focus,
            )

        folder = Path(self.recipe.output) / "checkpoints" / "tokenizer"
        return stored_tokenizer(folder, make, "student.tokenizer")

    def inserted(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """The ids inserted after the first token of the student's rows."""
        section = self.recipe.student
        place = section.tokenizer or section.path or "the student"
        return inserted_ids(tokenizer, section.insert, "student.insert", place)

    def tokens(self, name: str, split: TextRows) -> Rows:
        """A split in the student's tokens; kept for later runs where the recipe names a finished tokenizer."""
        section, tokenizer, focus = self.recipe.student, self.tokenizer, self.data.focus
        insert = self.inserted(tokenizer)

        def make() -> Rows:
            return tokenize_split(split, tokenizer, section.max_length, focus, insert)

        if section.tokenizer is None:
            return make()
        key = ("tokens", self.recipe.data, name, section.tokenizer, section.max_length, insert)
        return self.shared.once(key, make)

    @cached_property
    def training_rows(self) -> TextRows:
        """The training rows; unlabelled rows are used only by methods with a teacher."""
        data = self.data
        if not self.learns_from_teacher and bool((data.train.labels == IGNORED).all()):
            raise KdtrainError(
                f"method {self.recipe.method_name} learns from labels, and none of the {len(data.train)} training rows has one; add labels, or "
                "take a method with a teacher"
            )
        return (
            data.train + data.unlabelled
            if self.learns_from_teacher and self.recipe.data.use_unlabelled
            else data.train
        )

    # ---- stored teacher outputs

    @property
    def cache_folder(self) -> Path:
        """Where the teacher outputs are stored."""
        return Path(self.recipe.teacher.cache or Path(self.recipe.output) / "teacher_cache")

    @property
    def cached_rows(self) -> TextRows:
        """The rows whose teacher outputs a run needs: those it measures on, and those it learns from the teacher."""
        measured = self.data.valid + self.data.test
        return self.training_rows + measured if self.learns_from_teacher else measured

    @property
    def stored_layers(self) -> tuple[int, ...]:
        """Layers of the teacher whose states the methods read, ascending."""
        return teacher_layers(self.methods, "teacher").all_states

    @property
    def stores_sequences(self) -> bool:
        """Whether the methods read the states of every token of the teacher."""
        return bool(teacher_layers(self.methods, "teacher").tokens)

    def store_spec(self, *, logits_only: bool = False) -> StoreSpec:
        """Whose outputs, of which layers, this run needs."""
        assert self.teacher is not None
        section = self.recipe.teacher
        return store_spec(
            self.teacher,
            focus=self.data.focus,
            dtype=section.dtype,
            layers=() if logits_only else section.layers + self.stored_layers,
            sequences=not logits_only and (section.sequences or self.stores_sequences),
        )

    def prepare_work(self, rows: TextRows, device: torch.device) -> Prepare:
        """How the teacher computes these rows."""
        assert self.teacher is not None
        return prepare_work(self.teacher, rows, self.data.focus, device)

    def filled_store(self, accelerator: Accelerator, measured: TextRows | None = None) -> Store:
        """Open the teacher cache and compute what it lacks; all processes take part.

        Args:
            measured: rows that only logits are needed of, in place of all rows of the run.
        """
        rows = self.cached_rows if measured is None else measured
        return filled_store(
            self.cache_folder,
            self.store_spec(logits_only=measured is not None),
            rows.keys(),
            self.prepare_work(rows, accelerator.device),
            accelerator,
            batch_tokens=self.recipe.teacher.batch_tokens,
        )

    # ---- the run

    def prepare(self, accelerator: Accelerator) -> Prepared:
        """Tokenizer, student, stored teacher outputs, rows."""
        data, teacher = self.data, self.teacher
        with main_process_first(accelerator):
            _ = self.tokenizer
        student = self.student
        cache = None
        if teacher is not None:
            cache = self.filled_store(accelerator)
            teacher.model.cpu()
        rows = self.training_rows
        stored = None
        if cache is not None and self.learns_from_teacher:
            stored = TeacherRows(cache, rows, self.stored_layers, sequences=self.stores_sequences)
        train = LabelledRows(
            self.tokens(f"train, {len(rows)} rows", rows),
            rows.labels,
            rows.digest(),
            stored,
            "none" if not self.stored_layers else "sequences" if self.stores_sequences else "first tokens",
        )
        valid, test = (
            self.measured(name, split, cache) for name, split in (("valid", data.valid), ("test", data.test))
        )
        return Prepared(Objective(student, self.methods, Classifiers()), train, valid, test)

    def measured(self, name: str, split: TextRows, cache: Store | None) -> LabelledRows:
        """A split to measure on, with the logits of the teacher where a cache is at hand."""
        stored = None if cache is None else TeacherRows(cache, split)
        return LabelledRows(self.tokens(name, split), split.labels, split.digest(), stored)

    def metrics(self, values: Tensor, data: TrainingData) -> dict[str, float]:
        """Of logits (rows, C)."""
        assert isinstance(data, LabelledRows)
        return classification_metrics(values, data.labels, data.teacher_logits)

    def final(
        self, prepared: Prepared, position: Position, folder: Path, accelerator: Accelerator
    ) -> dict[str, dict[str, Any]]:
        """Both splits in float32, as the saved student computes when it is loaded; the predictions are kept."""
        objective, found = prepared.objective, {}
        objective.eval()
        for name, split in (("valid", prepared.valid), ("test", prepared.test)):
            assert isinstance(split, LabelledRows)
            logits = measured_rows(objective.measure, split, accelerator, tokens=self.evaluation_tokens)
            if accelerator.is_main_process:
                save_predictions(folder / "predictions" / f"{name}.safetensors", logits, split)
            found[name] = report(logits, split.labels, split.teacher_logits)
        return found

    def save(self, prepared: Prepared, state: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        """The student with its tokenizer, and the weights of the methods beside it."""
        student, test = prepared.objective.student, prepared.test
        assert isinstance(student, PreTrainedModel) and isinstance(test, LabelledRows)
        with quiet(), atomic_folder(folder / "student") as temporary:
            student.save_pretrained(temporary)
            tokenizer = copy.copy(self.tokenizer)
            tokenizer.model_max_length = (
                self.recipe.student.max_length
            )  # a teacher is asked as it was trained
            tokenizer.save_pretrained(temporary)
        own = {name: value for name, value in state.items() if not name.startswith("student.")}
        if own:
            write_tensors(folder / "projection.safetensors", own)
        return {
            "architecture": student.config.model_type,
            "parameters": parameter_count(student),
            "bytes": folder_bytes(folder / "student"),
            "latency_ms": latency_ms(student, test.rows),
        }

    def describe_data(self, prepared: Prepared) -> dict[str, Any]:
        """Name, content and rows of each split."""
        data = self.data
        sizes = {name: len(getattr(data, name)) for name in ("train", "valid", "test", "unlabelled")}
        return {"name": data.name, "fingerprint": data.fingerprint(), "rows": sizes}

    def describe_teacher(self, prepared: Prepared) -> dict[str, Any] | None:
        """The teacher and its own test metrics."""
        test = prepared.test
        if self.teacher is None:
            return None
        assert isinstance(test, LabelledRows) and test.teacher_logits is not None
        return {
            "path": self.teacher.path,
            "parameters": parameter_count(self.teacher.model),
            "test": report(test.teacher_logits, test.labels, None),
        }
