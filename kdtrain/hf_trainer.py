"""Distillation inside transformers' own Trainer: one class to change in a script that has one.

trainer = KDTrainer(student, "big-code-model", args=KDConfig(output_dir="out"), train_dataset=data)
trainer.train()
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from kdtrain.engine.zero import gathered_weights, loading_whole, zero3_parameters
from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Step
from kdtrain.methods.kd import KDOptions, LogitDistillation
from kdtrain.models.heads import check_model, mixes_documents
from kdtrain.models.language_teacher import DTYPES, LanguageTeacher, load_language_teacher
from kdtrain.models.vocabulary import match_vocabularies
from kdtrain.objective import Objective
from kdtrain.outputs import IGNORED
from kdtrain.tasks.code_lm.outputs import LanguageModels
from kdtrain.tasks.code_lm.packing import padded_batch
from kdtrain.tasks.code_lm.task import shape_of


@dataclass
class KDConfig(TrainingArguments):
    """`TrainingArguments` and how the student learns: ce_weight * CE + kd_weight * T^2 * divergence for every token."""

    divergence: str = field(
        default="forward_kl",
        metadata={"help": "forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl or tvd"},
    )
    beta: float = field(default=0.5, metadata={"help": "weight of the teacher in the mixture of jsd"})
    alpha: float = field(
        default=0.1, metadata={"help": "weight of the mixed-in side of the skewed divergences"}
    )
    temperature: float = field(default=1.0, metadata={"help": "T that softens both sides"})
    kd_weight: float = field(default=1.0, metadata={"help": "weight of the divergence"})
    ce_weight: float = field(default=0.5, metadata={"help": "weight of the cross-entropy with the labels"})
    teacher_precision: str = field(
        default="fp32", metadata={"help": "fp32 or bf16, of a teacher given by name or folder"}
    )

    def options(self) -> KDOptions:
        """The same as options of method kd.

        Raises:
            KdtrainError: a number out of range, or nothing to learn from.
        """
        if self.kd_weight == 0 and self.ce_weight == 0:
            raise KdtrainError(
                "kd_weight and ce_weight are both 0, so there is nothing to learn; set one of them above 0"
            )
        divergence: dict[str, Any] = {"name": self.divergence}
        if self.divergence == "jsd":
            divergence["beta"] = self.beta
        elif self.divergence in ("skew_kl", "skew_reverse_kl"):
            divergence["alpha"] = self.alpha
        return LogitDistillation.Options.parse(
            {
                "divergence": divergence,
                "temperature": self.temperature,
                "kd_weight": self.kd_weight,
                "ce_weight": self.ce_weight,
            }
        )


class KDTrainer(Trainer):
    """`Trainer` whose loss is a distillation loss; the logits of student and teacher never exist as a whole.

    The loss is the sum over the labels that count, divided by their number in the whole accumulated batch over all
    processes. Evaluation gives `eval_loss` (cross entropy), `eval_divergence` and `eval_agreement`, exact over all
    tokens. The student is saved as it is; the teacher is nowhere in the checkpoints.

    Args:
        model: a causal language model; or None, with `model_init` among the others.
        teacher: a causal language model, or its folder or hub id, whose tokenizer is then compared with
            `processing_class` token by token.
        args: `KDConfig`. Its weights, temperature and divergence are read in every step, so that a search over them or
            a callback may change them.
        others: as for `Trainer`. Data sets have `input_ids` and `labels` (not shifted, -100 where nothing counts).

    Raises:
        KdtrainError: tokenizers or heads that do not fit; DataParallel; a teacher that ZeRO 3 has cut or that holds weights
            which the student trains; what is no causal language model; virtual tokens (prompt learning); what needs logits
            (`compute_metrics`) or another loss (`compute_loss_func`, `label_smoothing_factor`).
    """

    loss_is_scaled_for_ga = True
    args: KDConfig

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher: PreTrainedModel | str | os.PathLike[str] | None = None,
        args: KDConfig | None = None,
        **others: Any,
    ) -> None:
        refuse_what_is_not_read(args, others)
        assert args is not None
        if isinstance(teacher, os.PathLike):
            teacher = os.fspath(teacher)
        if model is not None:
            check_kind(model, "student")
        if not isinstance(teacher, str):
            check_kind(teacher, "teacher")
            refuse_lower_precision(teacher, args.teacher_precision)  # type: ignore[arg-type]
            if model is not None:
                refuse_shared_weights(model, teacher)  # type: ignore[arg-type]
        self.distillation: Objective | None = None
        super().__init__(model=model, args=args, **others)
        if args.n_gpu > 1:
            raise KdtrainError(
                "KDTrainer runs in one process a device, with DDP, FSDP2 or DeepSpeed; DataParallel is not supported yet"
            )
        self.model_accepts_loss_kwargs = True  # makes Trainer count the labels of an accumulated batch
        known = open_teacher(teacher, args.teacher_precision)  # type: ignore[arg-type]
        self.plain_collator = self.data_collator
        self.measured = torch.zeros(4, dtype=torch.float64)
        self.distil(self.model, known)  # type: ignore[arg-type]
        known.place(self.accelerator)

    def distil(self, model: PreTrainedModel, known: LanguageTeacher) -> None:
        """Make `model` the student: it is compared with the teacher, and its forward can do the loss."""
        with gathered_weights(zero3_parameters(model).values()):
            check_model(model, "student", packing=False)
            mixing = {"student": mixes_documents(model), "teacher": mixes_documents(known.model)}
        sizes = [side.config.get_text_config().vocab_size for side in (model, known.model)]
        vocab_map = None
        if known.tokenizer is not None and self.processing_class is not None:
            vocab_map = match_vocabularies(self.processing_class, known.tokenizer, *sizes).vocab_map  # type: ignore[arg-type]
        elif sizes[0] != sizes[1]:
            raise KdtrainError(
                f"the heads of student and teacher have {sizes[0]} and {sizes[1]} rows; name the teacher by its folder or hub id "
                "and give processing_class, so that their tokens can be compared"
            )
        self.known = known
        models = LanguageModels(known, vocab_map)
        self.distillation = Objective(model, [self.method(model, known)], models)
        model.forward = with_distillation(model.forward, self.distillation)
        mixing = " and ".join(side for side, mixes in mixing.items() if mixes)
        self.data_collator = partial(collate_counted, self.plain_collator, mixing=mixing)

    def method(self, model: PreTrainedModel, teacher: LanguageTeacher) -> LogitDistillation:
        """What `args` asks for now."""
        return LogitDistillation(self.args.options(), shape_of(model), {"teacher": shape_of(teacher.model)})

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As Trainer's; every model that `model_init` makes learns from the teacher."""
        model = super().call_model_init(trial)
        check_kind(model, "student")
        if self.distillation is not None:  # the first is made before there is a teacher
            refuse_shared_weights(model, self.known.model)
            self.distil(model, self.known)  # type: ignore[arg-type]
        return model

    def _set_signature_columns_if_needed(self) -> None:
        """As Trainer's, with position ids: a family that does not read them would have them dropped in silence."""
        super()._set_signature_columns_if_needed()
        if "position_ids" not in self._signature_columns:  # type: ignore[operator]
            self._signature_columns.append("position_ids")  # type: ignore[union-attr]

    def get_batch_samples(self, *args: Any, **options: Any) -> tuple[list[Any], Any]:
        """As Trainer's; refuses a batch that holds nothing to learn, and reads what `args` says now."""
        assert self.distillation is not None
        (method,) = self.distillation.plan
        if self.args.options() != method.options:  # a search sets them when the model is there already
            self.distillation.learn_by([self.method(self.model, self.known)])  # type: ignore[arg-type]
        samples, count = super().get_batch_samples(*args, **options)
        if samples and isinstance(count, Tensor) and not count.any():
            raise KdtrainError(
                f"step {self.state.global_step + 1} has no label that counts: all labels of its rows, on every process, are "
                f"{IGNORED}; look at the masks of the data set, and whether prompts alone fill its rows"
            )
        return samples, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one piece of an accumulated batch, inside the wrapped forward of `model`."""
        piece = padded_batch(inputs)
        if model.training:
            assert self.distillation is not None
            self.distillation.step = Step(self.state.global_step, self.state.max_steps)
        divisor = (piece.labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss, _ = model(kd_piece=piece, kd_divisor=divisor)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages, this loss is a share of a sum
        return (loss, {"loss": loss}) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Add up what is measured; there are no logits to hand out."""
        inputs = self._prepare_inputs(inputs)
        sums = model(kd_piece=padded_batch(inputs), kd_measure=True)
        # On several processes the last batch is filled up with rows that were measured already.
        if self.accelerator.num_processes > 1:
            self.refuse_other_rows(len(sums))
            sums = self.accelerator.gather_for_metrics(sums)
        sums = sums.sum(0)  # type: ignore[union-attr]
        self.measured = self.measured.to(sums.device) + sums
        return (sums[0] / sums[3].clamp_min(1)).float(), None, None

    def refuse_other_rows(self, rows: int) -> None:
        """gather_for_metrics leaves rows out that are there twice: it counts examples, of which each has to be a row."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return
        loader: Any = state.active_dataloader
        processes = self.accelerator.num_processes
        if isinstance(loader, DataLoaderDispatcher):  # fills up to a multiple of the processes only
            expected = -(-state.remainder // processes)
        else:
            expected = loader.total_batch_size // processes
        if rows != expected:
            raise KdtrainError(
                f"the collator made {rows} rows of {expected} examples, and the last batch of the evaluation is filled up with "
                "examples that were measured already, which cannot be told apart then; evaluate on one process, or on a number of "
                f"examples that is a multiple of {processes * expected}, or with a collator that makes one row of each"
            )

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> EvalLoopOutput:
        """As Trainer's, with means over all tokens in place of means of means."""
        self.measured = torch.zeros_like(self.measured)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        sums = self.measured.tolist()
        assert output.metrics is not None
        for name, value in zip(("loss", "divergence", "agreement"), sums, strict=False):
            output.metrics[f"{metric_key_prefix}_{name}"] = value / max(sums[3], 1)
        return output


def refuse_what_is_not_read(args: TrainingArguments | None, others: dict[str, Any]) -> None:
    """Refuse arguments of `Trainer` that would do nothing here."""
    if not isinstance(args, KDConfig):
        raise KdtrainError(f"KDTrainer takes args of the type KDConfig, got {type(args).__name__}")
    if args.label_smoothing_factor:
        raise KdtrainError(
            f"label_smoothing_factor is {args.label_smoothing_factor}, but the loss of KDTrainer has no smoothed labels; set it to 0"
        )
    for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
        if others.get(name) is not None:
            raise KdtrainError(
                f"{name} would never be called: KDTrainer has a loss of its own and makes no logits; leave it out"
            )


def check_kind(model: Any, side: str) -> None:
    """Refuse what is no causal language model."""
    config = getattr(model, "config", None)
    if not hasattr(model, "get_output_embeddings") or config is None:
        raise KdtrainError(
            f"the {side} is a {type(model).__name__}; KDTrainer takes a causal language model of transformers"
            + (", or its folder or hub id" if side == "teacher" else "")
        )
    if getattr(config, "is_encoder_decoder", False):
        raise KdtrainError(
            f"the {side} ({type(model).__name__}) is an encoder with a decoder; KDTrainer takes causal language models"
        )
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters):
        raise KdtrainError(
            f"the {side} ({type(model).__name__}) learns virtual tokens, which its body alone does not read; use adapters of "
            "its layers (LoRA)"
        )


def refuse_lower_precision(teacher: nn.Module, precision: str) -> None:
    """`teacher_precision` does nothing to a teacher that is loaded."""
    dtype = next(teacher.parameters()).dtype
    if DTYPES.get(precision, torch.float32) not in (torch.float32, dtype):
        raise KdtrainError(
            f"teacher_precision is {precision!r}, but the teacher is loaded already, in {dtype}; load it in that precision or "
            "give its folder or hub id"
        )


def refuse_shared_weights(student: nn.Module, teacher: nn.Module) -> None:
    """Freezing the teacher would freeze what the student trains."""
    if teacher is student:
        raise KdtrainError(
            "the teacher is the student itself, which would be frozen; load the checkpoint a second time"
        )
    held = {id(parameter) for parameter in teacher.parameters()}
    shared = [
        name for name, weight in student.named_parameters() if weight.requires_grad and id(weight) in held
    ]
    if shared:
        raise KdtrainError(
            f"the teacher holds {len(shared)} weights that the student trains ({shared[0]} and so on), which would be frozen; "
            "load the teacher a second time"
        )


def collate_counted(
    collate: Callable[[Any], dict[str, Tensor]], rows: Any, *, mixing: str = ""
) -> dict[str, Tensor]:
    """A collated batch in which exactly the labels that the loss counts are left, since Trainer counts for itself.

    It would also count the first token of a document, which nothing before it predicts.

    Args:
        mixing: the models, in words, in which a document sees what stands before it in its row.

    Raises:
        KdtrainError: no labels; a packed row that goes on from within a document that does not begin in it; a document
            behind padding or another one where `mixing` names a model.
    """
    inputs = collate(rows)
    if "position_ids" in inputs:
        refuse_cut_documents(inputs)
    elif told := [name for name in ("seq_idx", "cu_seq_lens_q") if name in inputs]:
        raise KdtrainError(
            f"a batch tells its documents apart by {told[0]} alone, which is not read, so they would see each other; let the "
            "collator return position_ids"
        )
    batch = padded_batch(inputs)
    shifted = batch.labels
    behind = (batch.positions[:, 1:] == 0).cumsum(1) > 0
    if mixing and bool((behind & (shifted[:, 1:] != IGNORED)).any()):
        raise KdtrainError(
            f"a batch holds a document behind padding or behind another document, which it sees in this {mixing}: nothing in "
            "this family keeps them apart; pad on the right (padding_side) and put one document into a row"
        )
    inputs["labels"] = torch.cat([torch.full_like(shifted[:, :1], IGNORED), shifted[:, :-1]], dim=1)
    return inputs


def refuse_cut_documents(inputs: dict[str, Tensor]) -> None:
    """Position ids (B, N) have to begin at 0 and then go up by one or begin again, wherever there is no padding."""
    places = inputs["position_ids"]
    before = torch.cat([torch.full_like(places[:, :1], -1), places[:, :-1]], dim=1)
    wrong = (places != 0) & (places != before + 1)
    if "attention_mask" in inputs:
        wrong &= inputs["attention_mask"].bool()
    if wrong.any():
        row, column = (int(number) for number in wrong.nonzero()[0])
        raise KdtrainError(
            f"row {row} of a batch holds a document cut in the middle: position {int(places[row, column])} stands at its token "
            f"{column}, where 0 or {int(before[row, column]) + 1} was due; begin a new document there (position 0), or pack "
            "whole documents only"
        )


def open_teacher(teacher: PreTrainedModel | str, precision: str) -> LanguageTeacher:
    """A frozen teacher, loaded where a name was given."""
    if precision not in DTYPES:
        raise KdtrainError(f"teacher_precision is {precision!r}; it is one of {', '.join(DTYPES)}")
    if isinstance(teacher, str):
        with loading_whole():
            return load_language_teacher(teacher, precision, packing=False)
    if zero3_parameters(teacher):
        raise KdtrainError(
            "ZeRO 3 has cut the teacher while it was loaded, and nothing puts it together to run; give KDTrainer its folder or "
            "hub id, or load it before KDConfig is made"
        )
    teacher.eval().requires_grad_(False)
    check_model(teacher, "teacher", packing=False)
    path = str(teacher.config.name_or_path)
    return LanguageTeacher(path, teacher, None)  # type: ignore[arg-type]


def with_distillation(plain: Callable[..., Any], objective: Objective) -> Callable[..., Any]:
    """The model's own forward, and behind `kd_piece` the objective: what a loss uses is used inside the wrapped forward."""
    owner = getattr(plain, "__self__", None)
    if owner is not None:
        plain = plain.__func__  # type: ignore[attr-defined]

    @wraps(plain)
    def forward(
        *args: Any, kd_piece: Any = None, kd_divisor: Any = 1, kd_measure: bool = False, **options: Any
    ) -> Any:
        if kd_piece is None:
            return plain(*args, **options)
        return objective.measure(kd_piece) if kd_measure else objective(kd_piece, kd_divisor)

    # The words of the plain forward, by which Trainer chooses columns, but not the way back to it: accelerate's unwrap_model
    # goes back as far as it can, and the loss would be gone.
    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    del forward.__wrapped__
    # A method, as it was: a deep copy of the model then runs its own weights.
    return forward if owner is None else MethodType(forward, owner)
