"""One language-model run, from recipe to student: prepare everything, train, measure, save."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdtrain.console import say
from kdtrain.engine.full_state import whole_state
from kdtrain.engine.run_folder import claimed
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.metrics import metrics_at
from kdtrain.files import atomic_folder, folder_bytes, write_tensors
from kdtrain.loop import describe_training, train
from kdtrain.models.heads import check_model
from kdtrain.models.language_student import (
    SAMPLE_CODE,
    build_language_student,
    check_length,
    check_tokenizer_survives,
    student_tokenizer,
)
from kdtrain.models.language_teacher import LanguageTeacher, load_language_teacher
from kdtrain.models.loading import quiet, tokenizer_hash, weights_hash
from kdtrain.models.lora import adapted_layers, merged_student
from kdtrain.models.vocabulary import match_vocabularies
from kdtrain.summary import Summary, installed_versions
from kdtrain.tasks.classification.prepare import start_accelerator
from kdtrain.tasks.code_lm.documents import Documents, load_documents
from kdtrain.tasks.code_lm.metrics import language_metrics
from kdtrain.tasks.code_lm.objective import LanguageObjective
from kdtrain.tasks.code_lm.packing import PackedRows, pack
from kdtrain.tasks.code_lm.recipe import LanguageRecipe
from kdtrain.tasks.code_lm.store import stored_rows
from kdtrain.teacher_cache.external import ShardRows, open_shards
from kdtrain.teacher_cache.token_build import build_language_cache
from kdtrain.teacher_cache.token_cache import Kind, Signal
from kdtrain.teacher_cache.token_rows import CachedRows

PADDING = 0
"""What rows are filled up with. It is never read, but every model has to have it: a tokenizer's own may be one that was added for
the student alone."""


@dataclass(frozen=True)
class Prepared:
    """All that a run is made of, before anything is trained."""

    tokenizer: PreTrainedTokenizerBase
    student: PreTrainedModel
    teacher: LanguageTeacher | None
    objective: LanguageObjective
    train: PackedRows
    valid: PackedRows
    identity: dict[str, str | None]
    """hashes of data and teacher"""
    shards: ShardRows | None
    """the training rows with kept tokens of a teacher that ran elsewhere, in its place"""


class LanguageSummary(Summary):
    """The summary of a language model; `test` and `valid` hold the held-out metrics."""

    def line(self) -> str:
        """The run in one line."""
        found = self.test
        teacher = (
            f", divergence {found['divergence']:.4f}, agreement {found['agreement']:.1%}"
            if "agreement" in found
            else ""
        )
        return (
            f"{self.name}: held-out loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}{teacher}, "
            f"{self.student['parameters']:,} parameters, {self.training['tokens_per_second']:.0f} tokens/s, trained in "
            f"{self.training['seconds']:.0f} s"
        )


def prepare(recipe: LanguageRecipe) -> Prepared:
    """Load data, teacher and student and check that they fit together.

    Raises:
        KdtrainError: anything wrong with recipe, data, tokenizers or models, as one sentence.
    """
    tokenizer = student_tokenizer(recipe)
    if recipe.data.store is not None:
        stored = stored_rows(recipe.data, tokenizer, PADDING)
        rows, valid, fingerprint = stored.train, stored.valid, stored.fingerprint
    else:
        documents = load_documents(recipe.data, tokenizer)
        rows, valid = (packed(part, recipe) for part in documents)
        fingerprint = " ".join(part.fingerprint() for part in documents)
    objective = open_models(recipe, tokenizer)
    check_ids((rows, valid), tokenizer, objective)
    teacher, shards = objective.teacher, None
    if recipe.teacher.signal == "shards" and recipe.method.name != "ft":
        size = objective.student.config.get_text_config().vocab_size
        folder = str(recipe.teacher.path)
        shards = ShardRows.of(
            rows, open_shards(folder, recipe.data.max_length, tokenizer, size, recipe.teacher.tail)
        )
    signal = recipe.teacher.signal
    if teacher is not None and recipe.method.name != "ft" and signal != "online" and signal != "shards":
        Signal.for_run(signal, objective, recipe)  # refuses what cannot be stored before anything is written
    known = None if teacher is None else teacher.weights_hash
    identity = {
        "data": fingerprint,
        "teacher": known if shards is None else shards.shards.fingerprint,
        "weights at student.path": weights_hash(objective.student) if recipe.student.path else None,
        "student's tokenizer": tokenizer_hash(tokenizer),
    }
    return Prepared(tokenizer, objective.student, teacher, objective, rows, valid, identity, shards)


def packed(documents: Documents, recipe: LanguageRecipe) -> PackedRows:
    """Documents in rows, as the recipe says."""
    return pack(documents, recipe.data.max_length, PADDING, packing=recipe.data.packing)


def check_ids(
    parts: tuple[PackedRows, ...], tokenizer: PreTrainedTokenizerBase, objective: LanguageObjective
) -> None:
    """Refuse documents with tokens for which a model has no embedding, such as those added for the student alone."""
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    sides = {"student": objective.student}
    if objective.teacher is not None:
        sides["teacher"] = objective.teacher.model
    for side, model in sides.items():
        table = model.get_input_embeddings().weight
        assert isinstance(table, Tensor)
        size = len(table)
        if max(names) < size:
            continue
        for rows in parts:
            beyond = rows.tokens[rows.tokens >= size]
            if len(beyond):
                raise KdtrainError(
                    f"the documents hold {len(beyond)} tokens that the {side} cannot read: the first is {int(beyond[0])} "
                    f"({names.get(int(beyond[0]))!r}), its embeddings end at {size - 1}; choose a student.tokenizer without "
                    "them, or leave such documents out"
                )


def open_models(recipe: LanguageRecipe, tokenizer: PreTrainedTokenizerBase) -> LanguageObjective:
    """Teacher and student, checked against each other, behind the recipe's objective."""
    teacher = None
    if recipe.teacher.path is not None and recipe.teacher.signal != "shards":
        teacher = load_language_teacher(
            recipe.teacher.path, recipe.teacher.precision, packing=recipe.data.packing
        )
        check_length(teacher.model, "teacher", recipe.data.max_length)
    torch.manual_seed(recipe.seed)
    student = build_language_student(recipe, tokenizer, teacher)
    check_tokenizer_survives(student, tokenizer)
    check_model(student, "student", packing=recipe.data.packing)
    vocab_map = None
    if teacher is not None:
        match = match_vocabularies(
            tokenizer,
            teacher.tokenizer,
            student.config.get_text_config().vocab_size,
            teacher.model.config.get_text_config().vocab_size,
            SAMPLE_CODE,
        )
        vocab_map = match.vocab_map
    return LanguageObjective(
        student,
        recipe.method,
        teacher,
        vocab_map=vocab_map,
        stored=recipe.teacher,
    )


def run_language(recipe: LanguageRecipe) -> LanguageSummary:
    """Train, measure and save one student; everything lands in `recipe.output`.

    A finished run of the same recipe, data and teacher is recognised and given back; an unfinished one goes on
    exactly where it stopped; another run's folder is refused.
    """
    folder = Path(recipe.output)
    accelerator = start_accelerator(recipe, spread_weights=True)
    with accelerator.main_process_first():
        parts = prepare(recipe)
    with claimed(folder, recipe, parts.identity, accelerator) as finished:
        if not finished:
            train_and_save(recipe, parts, accelerator)
    summary = LanguageSummary.load(folder)
    if finished and accelerator.is_main_process:
        say(f"already done: {summary.line()}")
    return summary


def train_and_save(recipe: LanguageRecipe, parts: Prepared, accelerator: Accelerator) -> None:
    """The run in its folder, which it holds alone."""
    folder = Path(recipe.output)
    training, measured = parts.train, parts.valid
    if parts.teacher is not None:
        if recipe.teacher.signal != "online" and recipe.method.name != "ft":
            with accelerator.main_process_first():
                training, measured = stored_signals(recipe, parts, accelerator.device)
            parts.teacher.release()
        parts.teacher.place(accelerator)
    elif parts.shards is not None:
        training = parts.shards
        if accelerator.is_main_process:
            say(training.shards.words)
    evaluate = partial(language_metrics, data=measured, teacher=parts.teacher is not None)
    position = train(
        recipe,
        parts.objective,
        training,
        lambda model, accelerator: evaluate(model, accelerator=accelerator),
        folder,
        accelerator,
    )
    state = whole_state(parts.objective)
    if accelerator.is_main_process:
        parameters = save_language_student(folder, parts, state)
        valid = metrics_at(folder, position.best_step)
        summary = LanguageSummary(
            name=folder.name,
            method=recipe.method.name,
            seed=recipe.seed,
            student={
                "architecture": parts.student.config.model_type,
                "parameters": parameters,
                "bytes": folder_bytes(folder / "student"),
            },
            test=valid,
            valid=valid,
            teacher=described_teacher(parts),
            training=describe_training(position, accelerator),
            data={
                "name": recipe.data.train,
                "fingerprint": parts.identity["data"],
                "rows": {"train": len(parts.train), "valid": len(parts.valid)},
                "tokens": {"train": int(parts.train.lengths.sum()), "valid": int(parts.valid.lengths.sum())},
            },
            versions=installed_versions(),
        )
        summary.save(folder)
        say(summary.line())
    accelerator.wait_for_everyone()


def described_teacher(parts: Prepared) -> dict[str, object] | None:
    """The teacher as summary.json has it."""
    if parts.shards is not None:
        shards = parts.shards.shards
        return {"path": str(shards.folder), "name": shards.manifest["teacher"]}
    return parts.teacher and {"path": parts.teacher.path, "parameters": parts.teacher.parameters}


def stored_signals(
    recipe: LanguageRecipe, parts: Prepared, device: torch.device
) -> tuple[CachedRows, CachedRows]:
    """Training rows with the stored signal of the recipe, held-out rows with hidden states: both computed where missing."""
    assert parts.teacher is not None and recipe.teacher.signal not in ("online", "shards")
    folder = Path(recipe.teacher.cache) if recipe.teacher.cache else Path(recipe.output) / "teacher_cache"
    found = []
    kinds: tuple[tuple[PackedRows, Kind], ...] = (
        (parts.train, recipe.teacher.signal),
        (parts.valid, "hidden"),
    )
    for rows, kind in kinds:
        cache = build_language_cache(
            folder / kind,
            parts.teacher,
            Signal.for_run(kind, parts.objective, recipe),
            rows,
            batch_tokens=recipe.teacher.batch_tokens,
            device=device,
        )
        found.append(CachedRows.of(rows, cache))
    return found[0], found[1]


def save_language_student(folder: Path, parts: Prepared, state: dict[str, Tensor]) -> int:
    """Write `student/`, which plain transformers loads, and beside it what is no part of it; give its parameters.

    Beside it are the projections of a hidden-state loss, and in `adapter/` the adapters that student/ has merged in.
    """
    own = {
        name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")
    }
    plain = parts.student
    if adapted_layers(parts.student):
        with quiet(), atomic_folder(folder / "adapter") as temporary:
            parts.student.save_pretrained(temporary, state_dict=own)
        plain = merged_student(parts.student, own)
        own = plain.state_dict()
    parameters = sum(own[name].numel() for name, _ in plain.named_parameters())  # its own may be parts
    with quiet(), atomic_folder(folder / "student") as temporary:
        plain.save_pretrained(temporary, state_dict=own)
        parts.tokenizer.save_pretrained(temporary)
    others = {name: value for name, value in state.items() if not name.startswith("student.")}
    if others:
        write_tensors(folder / "projection.safetensors", others)
    return parameters
