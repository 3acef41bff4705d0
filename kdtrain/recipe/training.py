"""The `training:` section, which all tasks share; names are those of transformers where it has them."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kdtrain.errors import KdtrainError
from kdtrain.recipe.base import NOT_NEGATIVE, POSITIVE, SHARE, Flag, Number, Section, Whole

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class TrainingSection(Section):
    """Steps, optimizer, and how often to evaluate, save and log."""

    if TYPE_CHECKING:

        @property
        def metric_for_best_model(self) -> str:
            """Validation metric that selects the best checkpoint; each task declares its own."""
            ...

    num_train_epochs: Annotated[Number, POSITIVE] = Field(
        default=3.0, description="passes over the training rows"
    )
    max_steps: Annotated[Whole, POSITIVE] | None = Field(
        default=None, description="optimizer steps of the whole run; set, it wins over num_train_epochs"
    )
    batch_size: Annotated[Whole, POSITIVE] = Field(
        default=32, description="rows of one optimizer step, over all micro-batches and processes"
    )
    gradient_accumulation_steps: Annotated[Whole, POSITIVE] = Field(
        default=1,
        description="micro-batches per process and optimizer step; changes memory, never the result",
    )
    gradient_checkpointing: Flag = Field(
        default=False,
        description="recompute the student's layers in backward: less memory, a third more time",
    )
    learning_rate: Annotated[Number, POSITIVE] = Field(
        default=5e-4, description="peak learning rate of AdamW"
    )
    weight_decay: Annotated[Number, NOT_NEGATIVE] = Field(
        default=0.01, description="decay of matrices; biases and norms do not decay"
    )
    warmup_ratio: Annotated[Number, SHARE] = Field(
        default=0.1, description="share of the steps of linear warm-up"
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant_with_warmup", "cosine_with_min_lr", "warmup_stable_decay"
    ] = Field(default="linear", description="schedule of the learning rate after warm-up")
    lr_scheduler_kwargs: dict[str, Any] = Field(
        default={},
        description="further arguments of the schedule, as in transformers: min_lr, num_decay_steps, ...",
    )
    max_grad_norm: Annotated[Number, POSITIVE] = Field(
        default=1.0, description="the gradient is clipped to this norm; .inf does not clip"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="precision of the student's matmuls"
    )
    group_by_length: Flag = Field(default=True, description="put rows of similar length into one batch")
    eval_steps: Annotated[Whole, POSITIVE] | None = Field(
        default=None, description="steps between evaluations; by default once per epoch"
    )
    save_steps: Annotated[Whole, POSITIVE] | None = Field(
        default=None, description="steps between checkpoints; by default at every evaluation"
    )
    save_total_limit: Annotated[Whole, Field(ge=2)] = Field(
        default=2, description="checkpoints kept; the newest that is undamaged is resumed"
    )
    logging_steps: Annotated[Whole, POSITIVE] = Field(
        default=10, description="steps between lines of metrics.jsonl"
    )
    early_stopping_patience: Annotated[Whole, POSITIVE] | None = Field(
        default=None, description="stop after this many evaluations without a better metric"
    )
    ddp_timeout: Annotated[Whole, POSITIVE] = Field(
        default=600,
        description="seconds after which a process that does not answer the others in training ends the run",
    )
    report_to: tuple[Tracker, ...] = Field(default=(), description="trackers, through accelerate")

    @model_validator(mode="after")
    def _micro_batches_have_rows(self) -> Self:
        if self.gradient_accumulation_steps > self.batch_size:
            raise KdtrainError(
                "training.gradient_accumulation_steps splits a batch of training.batch_size rows and cannot be larger, "
                f"got {self.gradient_accumulation_steps} and {self.batch_size}"
            )
        return self
