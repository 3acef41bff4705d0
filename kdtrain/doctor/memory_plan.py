"""Where the memory of one device goes, and what the devices send each other, computed from shapes alone."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from kdtrain.files import human_bytes
from kdtrain.models.language_student import student_config
from kdtrain.models.loading import load_config
from kdtrain.recipe import LanguageRecipe, LanguageStudentSection

DEVICES = (1, 8, 64, 256, 1024)
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
STORED_WITHOUT_HEAD = ("topk", "cross_term", "shards")


@dataclass(frozen=True)
class ModelShape:
    """What a plan must know of a model."""

    parameters: int
    """all, embeddings included, a tied head once"""
    whole: int
    """of these, embeddings and head"""
    vocabulary: int
    width: int
    layers: int
    inner: int
    """width inside the feed-forward layers"""
    linear: tuple[tuple[str, int], ...]
    """name and width in + width out of every linear layer but the head"""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "ModelShape":
        """Counted on a model without memory."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        head = model.get_output_embeddings().weight
        heads = {model.get_input_embeddings().weight, head}
        text = config.get_text_config()
        inner = (
            getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
        )
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            whole=sum(weight.numel() for weight in heads),
            vocabulary=text.vocab_size,
            width=text.hidden_size,
            layers=text.num_hidden_layers,
            inner=inner,
            linear=tuple(
                (name, sum(module.weight.shape))
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear | Conv1D) and module.weight is not head
            ),
        )

    def trained(self, recipe: LanguageStudentSection) -> int:
        """The parameters that a student of this shape trains."""
        if recipe.lora_rank:
            ends = tuple(f".{target}" for target in recipe.lora_targets) or ("",)
            return recipe.lora_rank * sum(sides for name, sides in self.linear if f".{name}".endswith(ends))
        return self.parameters - (self.vocabulary * self.width if recipe.frozen_head else 0)


@dataclass(frozen=True)
class Plan:
    """Bytes of one device, by what they are for, and bytes it sends in one optimizer step."""

    devices: int
    tokens: int
    """in one piece of a batch"""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    masks: int
    """of attention, for documents that share a row"""
    loss: int
    teacher: int
    sent: int
    eager_loss: int
    """what logits, log-probabilities and their gradients would take in place of `loss`"""

    @property
    def total(self) -> int:
        """The sum of what is held at the worst moment."""
        moving = self.activations + self.masks + self.loss
        return self.weights + self.gradients + self.optimizer + moving + self.teacher


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows of logits that the losses hold at a time by default, on a GPU where memory allows (tests/language/test_plan.py holds this to kdkernels)."""
    if device == "cpu":
        return max(min(352, max(176, 2**27 // (8 * vocabulary))), 2**18 // vocabulary)
    return max(1024, 2**32 // (8 * vocabulary) // 256 * 256)


def plan_step(
    student: ModelShape,
    teacher: ModelShape | None,
    recipe: LanguageRecipe,
    devices: int,
    *,
    sharded: bool,
    device: str = "cuda",
) -> Plan:
    """Memory and communication of one device.

    Args:
        sharded: FSDP2: weights, gradients and optimizer state are spread; one layer is whole at a time, embeddings
            and head while the step lasts. Otherwise (DDP) every device holds everything.
        device: "cuda" or "cpu", whose loss holds fewer rows of logits at a time.
    """
    share = devices if sharded else 1
    half = recipe.training.precision != "fp32"
    unit = 2 if half else 4
    rows = math.ceil(recipe.training.batch_size / (recipe.training.gradient_accumulation_steps * devices))
    tokens = rows * recipe.data.max_length
    layer = (student.parameters - student.whole) // max(1, student.layers)
    gathered = (student.whole + 2 * layer) * unit if sharded else (student.parameters * unit if half else 0)
    # Kept for backward of one layer and token: four norms' inputs and outputs, q, k, v, the attention's output, the two
    # sums; gate, up, their activation and product in the feed-forward part.
    one_layer = tokens * unit * (10 * student.width + 4 * student.inner)
    distils = teacher is not None and recipe.method_name != "ft"
    widest = 0  # the widest moment of one layer of the teacher
    if teacher is not None and distils and recipe.teacher.runs_here:
        size = WEIGHT_BYTES[recipe.teacher.precision]
        widest = tokens * size * (4 * teacher.width + 3 * teacher.inner)
    # Documents that share a row are kept apart by a mask: true or false once, and as numbers in every layer that is kept.
    pairs = rows * recipe.data.max_length**2 if recipe.data.packing else 0
    if recipe.training.gradient_checkpointing:
        # A layer of the student is recomputed when those of the teacher are gone: the larger of the two counts.
        activations = student.layers * tokens * student.width * unit + max(0, one_layer - widest)
        masks = pairs * (1 + unit)
    else:
        activations = student.layers * one_layer
        masks = pairs * (1 + student.layers * unit)
    trained = student.trained(recipe.student)
    frozen = recipe.student.frozen_head or recipe.student.lora_rank > 0
    # Kept tokens and cross-terms need no logits of the teacher, nor do labels alone.
    blocks = (
        2
        if distils and recipe.teacher.signal not in STORED_WITHOUT_HEAD and recipe.teacher.targets != "topk"
        else 1
    )
    two = 2 if distils else 1
    loss = (
        4 * blocks * min(chunk_rows(student.vocabulary, device), tokens) * student.vocabulary
        + (0 if frozen else 4 * student.vocabulary * student.width)
        + 4 * tokens * student.width
    )
    # Logits and log-probabilities of each side, one gradient.
    eager = tokens * student.vocabulary * (4 * 2 * two + 4)
    held, sent_teacher = 0, 0
    if teacher is not None:
        size = WEIGHT_BYTES[recipe.teacher.precision]
        held = teacher.whole * size + (tokens * teacher.width * size if distils else 0)
        if recipe.teacher.runs_here or (
            not distils and recipe.teacher.source == "local"
        ):  # beside labels alone it is whole, too: to measure with
            body = teacher.parameters - teacher.whole
            held += body * size // share + (2 * body * size // teacher.layers if sharded else 0)
            held += widest
            sent_teacher = (
                recipe.training.gradient_accumulation_steps * body * size if sharded and distils else 0
            )
    sent = 0
    if devices > 1 and sharded:
        sent = (
            recipe.training.gradient_accumulation_steps * 2 * student.parameters * unit
            + trained * 4
            + sent_teacher
        )
    elif devices > 1:
        sent = 2 * trained * 4
    return Plan(
        devices=devices,
        tokens=tokens,
        weights=4 * student.parameters // share + gathered,
        gradients=4 * trained // share,
        optimizer=8 * trained // share,
        activations=activations,
        masks=masks,
        loss=loss,
        teacher=held,
        sent=sent,
        eager_loss=eager,
    )


def plan_table(recipe: LanguageRecipe) -> str:
    """The table that `kdtrain doctor --plan` prints, in Markdown: one line for each number of devices, with FSDP2."""
    config = student_config(recipe)
    student = ModelShape.of(config)
    path = None if recipe.teacher.signal == "shards" else recipe.teacher.path
    teacher = None if path is None else ModelShape.of(load_config(path, "teacher.path"))
    lines = [
        f"student {student.parameters:,} parameters, V {student.vocabulary:,}, D {student.width}"
        + ("" if teacher is None else f"; teacher {teacher.parameters:,} parameters, D {teacher.width}")
        + f"; {recipe.training.batch_size} rows of {recipe.data.max_length} tokens a step, {recipe.training.precision}",
        "",
        "| devices | tokens a piece | weights | gradients | optimizer | activations | masks | loss | (eager loss) | teacher | total | sent a step |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for devices in DEVICES:
        if devices > 1 and recipe.training.batch_size < devices:
            lines.append(
                f"| {devices} | training.batch_size {recipe.training.batch_size} is less than a row for each |"
            )
            continue
        plan = plan_step(student, teacher, recipe, devices, sharded=devices > 1)
        parts = (plan.weights, plan.gradients, plan.optimizer, plan.activations, plan.masks, plan.loss,
                 plan.eager_loss, plan.teacher, plan.total, plan.sent)  # fmt: skip
        lines.append(f"| {devices} | {plan.tokens} | {' | '.join(human_bytes(part) for part in parts)} |")
    return "\n".join(lines)
