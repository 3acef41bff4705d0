"""Task code_lm: the next token of code, learned from documents and from a larger language model."""

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdtrain.console import say
from kdtrain.engine.checkpoint import Position
from kdtrain.errors import KdtrainError
from kdtrain.files import atomic_folder, folder_bytes, write_tensors
from kdtrain.methods import build_methods
from kdtrain.methods.base import Method
from kdtrain.micro_batches import evaluating
from kdtrain.models.heads import check_model
from kdtrain.models.language_student import (
    SAMPLE_CODE,
    build_language_student,
    check_length,
    check_tokenizer_survives,
    student_tokenizer,
)
from kdtrain.models.language_teacher import LanguageTeacher, load_language_teacher
from kdtrain.models.loading import Shape, quiet, tokenizer_hash, weights_hash
from kdtrain.models.lora import adapted_layers, merged_student
from kdtrain.models.vocabulary import VocabularyMatch, check_ids, match_vocabularies
from kdtrain.objective import Objective
from kdtrain.outputs import IGNORED, Batch, Layers
from kdtrain.recipe import LanguageRecipe
from kdtrain.tasks.base import Prepared, Task, TrainingData
from kdtrain.tasks.code_lm.documents import Documents, load_documents
from kdtrain.tasks.code_lm.metrics import language_metrics
from kdtrain.tasks.code_lm.outputs import LanguageModels
from kdtrain.tasks.code_lm.packing import PackedRows, pack
from kdtrain.tasks.code_lm.served import ServedTeacher
from kdtrain.tasks.code_lm.store import stored_rows
from kdtrain.tasks.code_lm.targets import Kind, Target
from kdtrain.tasks.code_lm.teacher_outputs import ServedRows, TeacherRows
from kdtrain.teacher_cache.external import ExternalStore

PADDING = 0
"""What rows are filled up with. It is never read, but every model has to have it: a tokenizer's own may be one that was added for
the student alone."""


class CodeLM(Task[LanguageRecipe]):
    """One run of a code language model."""

    name: ClassVar[str] = "code_lm"
    sharded: ClassVar[bool] = True
    evaluation_tokens: ClassVar[int] = 4096

    # ---- what the recipe names

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the student."""
        return student_tokenizer(self.recipe)

    @cached_property
    def rows(self) -> tuple[PackedRows, PackedRows, str]:
        """Training rows, held-out rows, and a hash of both."""
        data = self.recipe.data
        if data.store is not None:
            stored = stored_rows(data, self.tokenizer, PADDING)
            return stored.train, stored.valid, stored.fingerprint
        documents = load_documents(data, self.tokenizer)
        train, valid = (self.packed(part) for part in documents)
        return train, valid, " ".join(part.fingerprint() for part in documents)

    def packed(self, documents: Documents) -> PackedRows:
        """Documents in rows, as the recipe says."""
        data = self.recipe.data
        return pack(documents, data.max_length, PADDING, packing=data.packing)

    @cached_property
    def teacher(self) -> LanguageTeacher | None:
        """The teacher, unless another program stored the outputs; of a served one only what is here."""
        section = self.recipe.teacher
        if section.path is None or section.signal == "shards":
            return None
        length = self.recipe.data.max_length
        if section.source == "server":
            teacher = ServedTeacher.load(section, length, head=section.asked == "hidden")
        else:
            teacher = load_language_teacher(section.path, section.precision, packing=self.recipe.data.packing)
        check_length(teacher.model, "teacher", length)
        return teacher

    @cached_property
    def match(self) -> VocabularyMatch | None:
        """How the heads line up, compared token by token."""
        student, teacher = self.student, self.teacher
        if teacher is None:
            return None
        ours, theirs = (model.config.get_text_config().vocab_size for model in (student, teacher.model))
        return match_vocabularies(self.tokenizer, teacher.tokenizer, ours, theirs, SAMPLE_CODE)

    @cached_property
    def student(self) -> PreTrainedModel:
        """The student, checked."""
        teacher = self.teacher
        torch.manual_seed(self.recipe.seed)
        student = build_language_student(self.recipe, self.tokenizer, teacher)
        check_tokenizer_survives(student, self.tokenizer)
        check_model(student, "student", packing=self.recipe.data.packing)
        return student

    @cached_property
    def models(self) -> LanguageModels:
        """Teacher and student, checked against each other."""
        teacher, section = self.teacher, self.recipe.teacher
        vocab_map = None if self.match is None else self.match.vocab_map
        if isinstance(teacher, ServedTeacher) and section.asked == "topk":
            teacher = None  # of which there is no head
        return LanguageModels(teacher, vocab_map, section.tail, self.recipe.temperature)

    @cached_property
    def objective(self) -> Objective:
        """The student with the methods of the recipe."""
        student, models = self.student, self.models
        shapes = {"teacher": Shape(0, 0)}  # of shards there is nothing but the distribution
        if self.teacher is not None:
            shapes = {"teacher": shape_of(self.teacher.model)}
        elif self.recipe.teacher.path is None:
            shapes = {}
        return checked_objective(
            student, build_methods(self.recipe.methods, self.name, shape_of(student), shapes), models
        )

    @cached_property
    def external(self) -> ExternalStore | None:
        """Top-k entries of a teacher that ran elsewhere, in its place."""
        section = self.recipe.teacher
        if section.signal != "shards" or not self.learns_from_teacher:
            return None
        size = self.student.config.get_text_config().vocab_size
        folder, length = Path(str(section.path)), self.recipe.data.max_length
        return ExternalStore.open_for(folder, length, self.tokenizer, size, section.tail)

    @cached_property
    def shards(self) -> TeacherRows | None:
        """The training rows with those entries."""
        return None if self.external is None else TeacherRows.external(self.rows[0], self.external)

    @property
    def learns_from_teacher(self) -> bool:
        """Whether a method reads the teacher."""
        return bool(self.objective.teacher_layers)

    @property
    def stored(self) -> Kind | None:
        """What is stored of the teacher; None where it runs in every step, or nothing is learned from it."""
        signal = self.recipe.teacher.signal
        if self.teacher is None or not self.learns_from_teacher or signal in ("online", "shards"):
            return None
        return signal

    def check_signal(self) -> None:
        """Refuse methods that the recipe cannot serve, or that read what the teacher does not give."""
        layers = self.objective.teacher_layers.values()
        section = self.recipe.teacher
        inner = any(one.all_states or one.attention for one in layers)
        live = any(method.needs().live for method in self.objective.plan)
        if section.runs_here or not (inner or live):
            return
        reason = f"which teacher.signal {section.signal} does not store; set teacher.signal: online"
        if section.source == "server":
            reason = "which a server does not answer; set teacher.source: local"
        what = "inner layers of the teacher" if inner else "the teacher on rows that are made in training"
        raise KdtrainError(f"method {self.recipe.method_name} reads {what}, {reason}")

    def target(self, kind: Kind) -> Target:
        """What this run stores of its teacher.

        Raises:
            KdtrainError: it cannot be stored for this student.
        """
        assert self.teacher is not None and self.match is not None
        return Target.for_run(kind, self.teacher, self.student, self.match.shared, self.recipe)

    @cached_property
    def served(self) -> ServedTeacher | None:
        """The teacher on servers that are asked in every step, compared with the recipe.

        Raises:
            KdtrainError: they do not answer, or serve something else; or a method reads more than they answer.
        """
        teacher = self.teacher
        if not isinstance(teacher, ServedTeacher) or not self.learns_from_teacher:
            return None
        live = any(method.needs().live for method in self.objective.plan if method.teachers)
        if live or self.objective.teacher_layers["teacher"] != Layers():
            raise KdtrainError(
                "a method samples from the teacher or reads inner layers, which a server does not answer; set teacher.source: local"
            )
        if self.recipe.teacher.signal != "online":
            return None
        teacher.check(self.target(self.recipe.teacher.asked))
        return teacher

    def identity(self) -> dict[str, str | None]:
        """Hashes of data and teacher, once everything was checked against each other."""
        self.check_signal()
        _, _, fingerprint = self.rows
        check_ids(
            [rows.tokens for rows in self.rows[:2]],
            self.tokenizer,
            {"student": self.student}
            if self.teacher is None
            else {"student": self.student, "teacher": self.teacher.model},
        )
        if self.stored is not None:
            self.target(self.stored)  # refuses what cannot be stored before anything is written
        _ = self.served
        teacher = None if self.teacher is None else self.teacher.weights_hash
        _ = self.shards  # refuses documents that they lack
        return {
            "data": fingerprint,
            "teacher": teacher if self.external is None else self.external.fingerprint,
            "weights at student.path": weights_hash(self.student) if self.recipe.student.path else None,
            "student's tokenizer": tokenizer_hash(self.tokenizer),
        }

    # ---- the run

    def prepare(self, accelerator: Accelerator) -> Prepared:
        """Stored teacher outputs where the recipe asks for them, and the teacher on its device."""
        train, valid, _ = self.rows
        data: TrainingData = train
        measured: TrainingData = valid
        if self.teacher is not None:
            if self.stored is not None:
                data, measured = self.stored_signals(accelerator)
                self.teacher.release()
            elif self.served is not None:
                several = len(self.objective.gradient_groups) > 1
                target = self.target(self.recipe.teacher.asked)
                data = ServedRows.asked(train, self.served, target, accelerator, self.recipe, keep=several)
                measured = self.held_out(accelerator)
            if self.models.teacher is not None:
                self.teacher.place(accelerator)
        elif self.shards is not None and self.external is not None:
            data = self.shards
            if accelerator.is_main_process:
                say(self.external.words)
        return Prepared(self.objective, data, measured)

    def stored_signals(self, accelerator: Accelerator) -> tuple[TeacherRows, TrainingData]:
        """Training rows with what the recipe stores, and the held-out rows: computed where missing.

        All processes take part.
        """
        assert self.stored is not None
        return self.computed(self.rows[0], self.stored, accelerator), self.held_out(accelerator)

    def held_out(self, accelerator: Accelerator) -> TrainingData:
        """Held-out rows with hidden states; without, where the teacher answers none."""
        if self.models.teacher is None:
            return self.rows[1]
        return self.computed(self.rows[1], "hidden", accelerator)

    def computed(self, rows: PackedRows, kind: Kind, accelerator: Accelerator) -> TeacherRows:
        """Rows with what a store holds of them; what it lacks is computed."""
        assert self.teacher is not None
        section = self.recipe.teacher
        folder = Path(section.cache) if section.cache else Path(self.recipe.output) / "teacher_cache"
        return TeacherRows.computed(
            rows,
            folder / kind,
            self.teacher,
            self.target(kind),
            accelerator,
            batch_tokens=section.batch_tokens,
        )

    def metrics(self, values: Tensor, data: TrainingData) -> dict[str, float]:
        """Of the held-out rows."""
        return language_metrics(values, teacher=self.models.teacher is not None)

    def final(
        self, prepared: Prepared, position: Position, folder: Path, accelerator: Accelerator
    ) -> dict[str, dict[str, Any]]:
        """The metrics of the best step as they were measured then; there are no rows that nothing was chosen by."""
        return {"valid": position.best_metrics} if accelerator.is_main_process else {}

    def save(self, prepared: Prepared, state: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        """`student/`, which plain transformers loads.

        Beside it are the weights of the methods, and in `adapter/` the adapters that student/ has merged in.
        """
        own = {
            name.removeprefix("student."): value
            for name, value in state.items()
            if name.startswith("student.")
        }
        plain = self.student
        if adapted_layers(self.student):
            with quiet(), atomic_folder(folder / "adapter") as temporary:
                self.student.save_pretrained(temporary, state_dict=own)
            plain = merged_student(self.student, own)
            own = plain.state_dict()
        parameters = sum(own[name].numel() for name, _ in plain.named_parameters())  # its own may be shards
        with quiet(), atomic_folder(folder / "student") as temporary:
            plain.save_pretrained(temporary, state_dict=own)
            self.tokenizer.save_pretrained(temporary)
        others = {name: value for name, value in state.items() if not name.startswith("student.")}
        if others:
            write_tensors(folder / "projection.safetensors", others)
        return {
            "architecture": self.student.config.model_type,
            "parameters": parameters,
            "bytes": folder_bytes(folder / "student"),
        }

    def describe_data(self, prepared: Prepared) -> dict[str, Any]:
        """Name, content, rows and tokens."""
        train, valid, fingerprint = self.rows
        return {
            "name": self.recipe.data.train,
            "fingerprint": fingerprint,
            "rows": {"train": len(train), "valid": len(valid)},
            "tokens": {"train": int(train.lengths.sum()), "valid": int(valid.lengths.sum())},
        }

    def describe_teacher(self, prepared: Prepared) -> dict[str, Any] | None:
        """The teacher as summary.json has it."""
        if self.external is not None:
            return {"path": str(self.external.folder), "name": self.external.manifest["teacher"]}
        return self.teacher and {"path": self.teacher.path, "parameters": self.teacher.parameters}

    def close(self) -> None:
        """Let go of servers."""
        if isinstance(vars(self).get("teacher"), ServedTeacher):
            vars(self)["teacher"].close()


def shape_of(model: PreTrainedModel) -> Shape:
    """Layers and width of a language model."""
    config = model.config.get_text_config()
    return Shape(int(config.num_hidden_layers), int(config.hidden_size))


def checked_objective(student: PreTrainedModel, methods: list[Method], models: LanguageModels) -> Objective:
    """Student and methods as one module; methods that look into attention are tried on two tokens.

    Raises:
        KdtrainError: the attention of the models cannot be compared.
    """
    objective = Objective(student, methods, models)
    if objective.student_layers.attention:
        ids = torch.arange(2, device=next(student.parameters()).device)[None]
        trial = Batch(ids, torch.tensor([[1, IGNORED]], device=ids.device), torch.zeros(1), position_ids=ids)
        with evaluating(objective), torch.no_grad():
            objective.loss(trial, 1)
    return objective
