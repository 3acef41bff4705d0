"""Distillation inside transformers' own Trainer: one class to change in a script that has one.

trainer = KDTrainer(student, "big-code-model", args=KDConfig(output_dir="out"), train_dataset=data)
trainer.train()
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from kdtrain.errors import KdtrainError
from kdtrain.language.evaluate import measured_rows
from kdtrain.language.heads import check_model, mixes_documents
from kdtrain.language.objective import LanguageObjective
from kdtrain.language.packing import IGNORED, padded_batch
from kdtrain.language.recipe import LanguageMethodRecipe
from kdtrain.language.teacher import DTYPES, LanguageTeacher, load_language_teacher
from kdtrain.language.vocabulary import match_vocabularies
from kdtrain.zero import gathered_weights, loading_whole, spread_weights


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
        default="fp32", metadata={"help": "fp32 or bf16, of a teacher given by name"}
    )

    def recipe(self) -> LanguageMethodRecipe:
        """The same in the words of a recipe, checked there."""
        return LanguageMethodRecipe(
            divergence=self.divergence,  # type: ignore[arg-type]
            beta=self.beta,
            alpha=self.alpha,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
        )


class KDTrainer(Trainer):
    """`Trainer` whose loss is a distillation loss; the logits of student and teacher never exist as a whole.

    The loss is the sum over the labels that count, divided by their number in the whole accumulated batch over all
    processes. Evaluation gives `eval_loss` (cross entropy), `eval_divergence` and `eval_agreement`, exact over all
    tokens. The student is saved as it is; the teacher is nowhere in the checkpoints.

    Args:
        model: a causal language model.
        teacher: a causal language model, or its folder or hub id, whose tokenizer is then compared with
            `processing_class` token by token.
        args: `KDConfig`.
        others: as for `Trainer`. Data sets have `input_ids` and `labels` (not shifted, -100 where nothing counts).

    Raises:
        KdtrainError: tokenizers or heads that do not fit; DataParallel; a teacher that ZeRO 3 has cut; what needs logits
            (`compute_metrics`) or another loss (`compute_loss_func`, `label_smoothing_factor`).
    """

    loss_is_scaled_for_ga = True
    args: KDConfig

    def __init__(
        self, model: PreTrainedModel, teacher: PreTrainedModel | str, args: KDConfig, **others: Any
    ) -> None:
        refuse_what_is_not_read(args, others)
        if teacher is model:
            raise KdtrainError(
                "the teacher is the student itself, which would be frozen; load the checkpoint a second time"
            )
        super().__init__(model=model, args=args, **others)
        if args.n_gpu > 1:
            raise KdtrainError(
                "KDTrainer runs in one process a device, with DDP, FSDP2 or DeepSpeed; DataParallel is not supported yet"
            )
        self.model_accepts_loss_kwargs = True  # makes Trainer count the labels of an accumulated batch
        known = open_teacher(teacher, args.teacher_precision)
        with gathered_weights(spread_weights(model).values()):
            check_model(model, "student", packing=False)
            mixing = {"student": mixes_documents(model), "teacher": mixes_documents(known.model)}
        sizes = [side.config.get_text_config().vocab_size for side in (model, known.model)]
        vocab_map = None
        if isinstance(teacher, str) and self.processing_class is not None:
            vocab_map = match_vocabularies(self.processing_class, known.tokenizer, *sizes).vocab_map  # type: ignore[arg-type]
        elif sizes[0] != sizes[1]:
            raise KdtrainError(
                f"the heads of student and teacher have {sizes[0]} and {sizes[1]} rows; name the teacher by its folder or hub id "
                "and give processing_class, so that their tokens can be compared"
            )
        self.objective = LanguageObjective(model, args.recipe(), known, vocab_map=vocab_map)
        known.place(self.accelerator)
        model.forward = with_distillation(model.forward, self.objective)
        self.measured = torch.zeros(4, dtype=torch.float64)
        mixing = " and ".join(side for side, mixes in mixing.items() if mixes)
        self.data_collator = partial(collate_counted, self.data_collator, mixing=mixing)

    def get_batch_samples(self, *args: Any, **options: Any) -> tuple[list[Any], Any]:
        """As Trainer's; refuses a batch that holds nothing to learn."""
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
            self.objective.start_step(self.state.global_step, self.state.max_steps)
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
        # The last batch is filled up with rows that were measured already; gather_for_metrics leaves them out.
        sums = self.accelerator.gather_for_metrics(sums).sum(0)  # type: ignore[union-attr]
        self.measured = self.measured.to(sums.device) + sums
        return (sums[0] / sums[3].clamp_min(1)).float(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> EvalLoopOutput:
        """As Trainer's, with means over all tokens in place of means of means."""
        self.measured = torch.zeros_like(self.measured)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        sums = self.measured.tolist()
        assert output.metrics is not None
        for name, value in zip(("loss", "divergence", "agreement"), sums, strict=False):
            output.metrics[f"{metric_key_prefix}_{name}"] = value / max(sums[3], 1)
        return output


def refuse_what_is_not_read(args: TrainingArguments, others: dict[str, Any]) -> None:
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
    batch = padded_batch(inputs)
    shifted = batch.labels
    behind = (batch.position_ids[:, 1:] == 0).cumsum(1) > 0
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
    if isinstance(teacher, str):
        if precision not in DTYPES:
            raise KdtrainError(f"teacher_precision is {precision!r}; it is one of {', '.join(DTYPES)}")
        with loading_whole():
            return load_language_teacher(teacher, precision, packing=False)
    if spread_weights(teacher):
        raise KdtrainError(
            "ZeRO 3 has cut the teacher while it was loaded, and nothing puts it together to run; give KDTrainer its folder or "
            "hub id, or load it before KDConfig is made"
        )
    teacher.eval().requires_grad_(False)
    check_model(teacher, "teacher", packing=False)
    path = str(teacher.config.name_or_path)
    return LanguageTeacher(path, teacher, None)  # type: ignore[arg-type]


def with_distillation(plain: Callable[..., Any], objective: LanguageObjective) -> Callable[..., Any]:
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
        return measured_rows(objective, kd_piece) if kd_measure else objective(kd_piece, kd_divisor)

    # A method, as it was: a deep copy of the model then runs its own weights.
    return forward if owner is None else MethodType(forward, owner)
