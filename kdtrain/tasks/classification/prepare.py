"""What has to stand before a run can start: its folder, tokenizer, method and the teacher's outputs."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdtrain.data.tokens import inserted_ids
from kdtrain.engine.zero import start_deepspeed
from kdtrain.errors import KdtrainError
from kdtrain.methods import method_class
from kdtrain.models.loading import Shape, load_config, load_tokenizer, shape_of, tokenizer_hash, weights_hash
from kdtrain.models.students import build_student
from kdtrain.models.teachers import Teacher, load_teacher
from kdtrain.models.tokenizers import stored_tokenizer, train_tokenizer
from kdtrain.recipe import Recipe, StudentRecipe
from kdtrain.tasks.base import RunRecipe
from kdtrain.tasks.classification.objective import Method
from kdtrain.tasks.classification.rows import UNLABELLED, TextRows
from kdtrain.tasks.classification.splits import ClassificationData
from kdtrain.teacher_cache.row_build import build_cache
from kdtrain.teacher_cache.row_cache import Identity, TeacherCache

KERNELS_KEPT = 16
"""How many of its compiled kernels oneDNN keeps on a CPU: GELU and its gradient have one for every number of tokens, and each lies
in the heap between larger blocks, which then fit nowhere. Its own 1,024 cost 1 to 4 MB a step; a run of 3.4 million parameters held 8 GB."""


def open_teacher(recipe: Recipe, data: ClassificationData) -> Teacher | None:
    """The teacher that the recipe names, if it names one."""
    if recipe.teacher.path is None:
        return None
    return load_teacher(recipe.teacher.path, data.classes, recipe.teacher, pairs=data.pairs)


def start_accelerator(recipe: RunRecipe, *, spread_weights: bool = False) -> Accelerator:
    """Accelerate for this run; each run of a process may have its own precision.

    Args:
        spread_weights: whether this command can do with parts of the student's weights (FSDP2, DeepSpeed's ZeRO 3).

    Raises:
        KdtrainError: a precision that does not work here, or weights in parts where they do not do.
    """
    # Accelerate keeps one global state a process and refuses a second precision unless it is cleared.
    AcceleratorState._reset_state(reset_partial_state=False)
    precision = recipe.training.precision
    if precision == "fp32":  # in bfloat16 products are oneDNN's too: they need more than these
        # oneDNN reads it before its first kernel; who set it keeps it.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return start_deepspeed(recipe.training, spread_weights=spread_weights)
    try:
        accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    except ValueError as error:
        raise KdtrainError(f"training.precision {precision} does not work on this machine: {error}") from None
    if precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would train in fp32 in silence
        raise KdtrainError(
            "training.precision fp16 needs a GPU, as nothing scales the loss on a CPU; use bf16 or fp32"
        )
    if accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env(
        "ACCELERATE_USE_FSDP"
    ):
        # Accelerate takes FSDP from its configuration on every device but the CPU, where it would run DDP in silence.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type == DistributedType.FSDP and not spread_weights:
        raise KdtrainError(
            "FSDP is for kdtrain train with task: code_lm, whose models are the large ones; use DDP here (recipes/accelerate/ddp.yaml)"
        )
    return accelerator


def run_identity(
    recipe: Recipe, data: ClassificationData, teacher: Teacher | None
) -> tuple[dict[str, str | None], PreTrainedModel | None]:
    """Hashes of all that a recipe only names, and the student where the recipe names its first weights."""
    given, student, tokenizer = recipe.student, None, None
    if given.path is not None or given.tokenizer is not None:
        tokenizer = student_tokenizer(recipe, data)
    if given.path is not None and tokenizer is not None:
        torch.manual_seed(recipe.seed)  # for a new head: the same one whatever was drawn before
        student = build_student(given, tokenizer, data.classes, pairs=data.pairs)
    return {
        "data": data.fingerprint(),
        "teacher": None if teacher is None else teacher.weights_hash(),
        "teacher's tokenizer": None if teacher is None else teacher.tokenizer_hash(),
        "weights at student.path": None if student is None else weights_hash(student.base_model),
        "student's tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
    }, student


def student_tokenizer(recipe: Recipe, data: ClassificationData) -> PreTrainedTokenizerBase:
    """The finished tokenizer that the recipe names, or one trained on the labelled training code."""
    given = recipe.student.tokenizer or recipe.student.path
    if given is not None:
        return load_tokenizer(given, "student.tokenizer" if recipe.student.tokenizer else "student.path")

    def make() -> PreTrainedTokenizerFast:
        return train_tokenizer(
            data.train.all_texts() if data.pairs else data.train.texts,
            vocab_size=recipe.student.vocab_size,
            max_length=recipe.student.max_length,
            focus=data.focus,
        )

    return stored_tokenizer(Path(recipe.output) / "checkpoints" / "tokenizer", make, "student.tokenizer")


def student_insert(recipe: StudentRecipe, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that stand behind the first token of the student's rows."""
    place = recipe.tokenizer or recipe.path or "the student"
    return inserted_ids(tokenizer, recipe.insert, "student.insert", place)


def training_rows(recipe: Recipe, data: ClassificationData, method: Method) -> TextRows:
    """The rows that this method trains on: unlabelled ones only where a teacher speaks for them."""
    if not method.needs_teacher and bool((data.train.labels == UNLABELLED).all()):
        raise KdtrainError(
            f"method {recipe.method.name} learns from labels, and none of the {len(data.train)} training rows has one; add labels, or "
            "take a method with a teacher"
        )
    return data.train + data.unlabelled if method.needs_teacher and recipe.data.use_unlabelled else data.train


def cached_rows(recipe: Recipe, data: ClassificationData, method: Method) -> TextRows:
    """The rows whose teacher outputs a run needs: those it measures on, and those it learns from the teacher."""
    measured = data.valid + data.test
    return training_rows(recipe, data, method) + measured if method.needs_teacher else measured


def cache_identity(recipe: Recipe, data: ClassificationData, teacher: Teacher, method: Method) -> Identity:
    """Whose outputs, of which layers, this run needs."""
    layers = recipe.teacher.layers + method.teacher_layers
    return Identity.of(
        teacher,
        focus=data.focus,
        dtype=recipe.teacher.dtype,
        layers=layers,
        sequences=recipe.teacher.sequences or method.whole_sequences,
    )


def prepare_cache(
    recipe: Recipe, data: ClassificationData, teacher: Teacher, method: Method, device: torch.device
) -> TeacherCache:
    """Open the teacher cache and compute the rows that it lacks."""
    rows = cached_rows(recipe, data, method)
    return build_cache(
        cache_folder(recipe),
        teacher,
        cache_identity(recipe, data, teacher, method),
        rows,
        batch_tokens=recipe.teacher.batch_tokens,
        device=device,
    )


def cache_folder(recipe: Recipe) -> Path:
    """Where this recipe's teacher outputs lie."""
    return Path(recipe.teacher.cache) if recipe.teacher.cache else Path(recipe.output) / "teacher_cache"


def build_method(recipe: Recipe, teacher: Teacher | None) -> Method:
    """The recipe's method, told the shapes of both sides."""
    method_type = method_class(recipe.method.name)
    if method_type.needs_teacher and teacher is None:
        raise KdtrainError(
            f"method {recipe.method.name} needs a teacher; set teacher.path to a folder or hub id"
        )
    given = recipe.student
    if given.path is not None:
        student = shape_of(load_config(given.path, "student.path"))
    else:
        recurrent = given.architecture == "bigru"
        student = Shape(given.layers, given.hidden_size * (2 if recurrent else 1), not recurrent)
    return method_type(recipe.method, student, None if teacher is None else shape_of(teacher.model.config))
