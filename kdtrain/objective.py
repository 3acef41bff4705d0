"""What is minimised, for every task: student and methods as one module, and a step's batch as the methods change it.

The loss is a weighted sum of named terms, each a sum over counted positions, divided once by their number in the whole
batch. That number is known before any micro-batch runs, so micro-batches, processes, padding and packing change
neither loss nor gradient.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdtrain.errors import KdtrainError
from kdtrain.methods.base import Method, Step, has_hook
from kdtrain.micro_batches import MicroBatches, StepBatch, evaluating, gather_ragged
from kdtrain.outputs import Batch, Layers, LogitTerm, Outputs, Shared, TeacherOutputs, Values
from kdtrain.tasks.base import Models, TrainingData

T = TypeVar("T")


class Objective(nn.Module):
    """A student and its methods as one module.

    Every weight that a loss uses is used inside `forward`, so that the wrappers of DDP and FSDP2 see it.
    """

    def __init__(self, student: nn.Module, methods: Sequence[Method], models: Models) -> None:
        super().__init__()
        self.student = student
        self.models = models
        self.step = Step()
        self._no_split_modules = getattr(student, "_no_split_modules", None)  # what FSDP2 shards
        self.learn_by(methods)

    def learn_by(self, methods: Sequence[Method]) -> None:
        """Take these methods in place of any other; terms with a name that several have get that of the method too."""
        for method in methods:
            method.attach(
                self.student, lambda network, batch: self.models.student_outputs(network, batch, Layers())
            )
        self.methods = nn.ModuleList(methods)
        self.plan = list(methods)
        self.sharing = any(method.needs().whole_batch for method in methods)
        self.student_layers = merged(methods, side=0)
        teachers = dict.fromkeys(name for method in methods for name in method.teachers)
        self.teacher_layers = {name: teacher_layers(methods, name) for name in teachers}
        names = [list(method.weights(Step())) for method in methods]
        repeated = {
            name for name, count in Counter(name for own in names for name in own).items() if count > 1
        }
        self.names = [
            {name: f"{method.options.name}_{i}.{name}" if name in repeated else name for name in own}
            for i, (method, own) in enumerate(zip(methods, names, strict=True), start=1)
        ]
        """of every method: the names of its terms among those of all"""

    def train(self, mode: bool = True) -> Self:
        """As any module's; a task without dropout stays in eval mode."""
        return super().train(mode and self.models.dropout)

    @property
    def sampling(self) -> Method | None:
        """The method that makes its own batches."""
        return next((method for method in self.plan if has_hook(type(method), "make_batch")), None)

    @property
    def selecting(self) -> Method | None:
        """The method that selects rows."""
        return next((method for method in self.plan if has_hook(type(method), "select")), None)

    @property
    def gradient_groups(self) -> tuple[tuple[str, ...] | None, ...]:
        """Groups of terms with a gradient of their own; one group of all terms unless a method combines gradients."""
        return next((method.gradient_groups for method in self.plan if method.gradient_groups), (None,))

    # ---- the loss

    def forward(
        self,
        batch: Batch | None = None,
        divisor: int | Tensor = 1,
        group: tuple[str, ...] | None = None,
        *,
        run: Callable[[], Any] | None = None,
    ) -> Any:
        """Loss of one micro-batch of a batch with `divisor` counted positions, 0-D, and the sums of the terms, detached.

        Args:
            batch: one micro-batch.
            divisor: counted positions of the whole batch.
            group: only the terms of this gradient group.
            run: something else to do inside the wrapped forward; its result is returned. The caller turns grad off, so
                that DDP expects no backward.
        """
        if run is not None:
            return run()
        assert batch is not None
        return self.loss(batch, divisor, group)

    def loss(
        self, batch: Batch, divisor: int | Tensor, group: tuple[str, ...] | None = None
    ) -> tuple[Tensor, Values]:
        """As `forward`."""
        student, teachers = self.outputs(batch)
        terms: dict[str, Tensor | LogitTerm] = {}
        weights: dict[str, float] = {}
        # The losses of a classifier work in float32 whatever the precision of the matmuls.
        device = batch.input_ids.device.type
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not student.precise):
            for number, method in enumerate(self.plan):
                given = {name: teachers[name] for name in method.teachers}
                own = batch
                if method.needs().whole_batch:
                    own = replace(batch, whole=self.shared(number, batch, student, given))
                names = self.names[number]
                found = method.terms(self.step, own, student, given)
                terms |= {names[name]: found[name] for name in names if group is None or name in group}
                weights |= {names[name]: weight for name, weight in method.weights(self.step).items()}
            return student.total(terms, weights, divisor)

    def measure(self, batch: Batch) -> Tensor:
        """(B, K): the numbers of every row that the metrics are computed from."""
        return self.models.measure(self.student, batch)

    def outputs(self, batch: Batch) -> tuple[Outputs, dict[str, TeacherOutputs]]:
        """Student and teachers on one micro-batch."""
        student = self.models.student_outputs(self.student, batch, self.student_layers)
        teachers = {
            name: self.models.teacher_outputs(name, batch, layers)
            for name, layers in self.teacher_layers.items()
        }
        return student, teachers

    def shared(
        self, number: int, batch: Batch, student: Outputs, teachers: Mapping[str, TeacherOutputs]
    ) -> dict[str, Shared]:
        """What a method shares over the whole batch; where this micro-batch is all of it, its own tensors."""
        prefix = f"{number}."
        if batch.whole:
            return {
                name.removeprefix(prefix): shared
                for name, shared in batch.whole.items()
                if name.startswith(prefix)
            }
        own = self.plan[number].share(self.step, batch, student, teachers)
        return {
            name: Shared(value.detach(), torch.arange(len(value), device=value.device))
            for name, value in own.items()
        }

    # ---- once per optimizer step

    @torch.no_grad()
    def prepare_step(
        self,
        model: nn.Module,
        step: Step,
        rows: Tensor,
        data: TrainingData,
        accelerator: Accelerator,
        splits: int,
    ) -> StepBatch:
        """Make the batch of a step: select rows, split them, make micro-batches, share tensors among them, count.

        Every process calls this at the same time.

        Args:
            model: this module as accelerate wrapped it.
            rows: row numbers of the whole batch.
            splits: micro-batches over all processes.
        """
        self.step = step
        if self.selecting is not None:
            rows = self.selected(self.selecting, model, rows, data, accelerator, splits)
        made = MicroBatches.of(rows, splits, data, accelerator, step.number + 1)
        scales = [accelerator.num_processes if len(part) else 0 for part in made.parts]
        batches, divisor = made, data.count(rows)
        if self.sampling is not None:
            method = self.sampling
            with evaluating(model):
                batches = [
                    method.make_batch(step, batch, Sampling(self, model, accelerator, filler=not scale))
                    for batch, scale in zip(made, scales, strict=True)
                ]
            counts = [self.models.count(batch) for batch, scale in zip(batches, scales, strict=True) if scale]
            divisor = int(accelerator.reduce(torch.tensor(sum(counts), device=accelerator.device), "sum"))  # type: ignore[arg-type]
            if divisor == 0:
                raise KdtrainError(
                    f"method {method.options.name} made a batch without any counted position at step {step.number + 1}"
                )
        if self.sharing and splits > 1:
            batches = self.with_whole(model, list(batches), scales, accelerator)
        return StepBatch(batches, scales, divisor, rows)

    def selected(
        self,
        method: Method,
        model: nn.Module,
        rows: Tensor,
        data: TrainingData,
        accelerator: Accelerator,
        splits: int,
    ) -> Tensor:
        """The rows that a method keeps, the same on all processes."""
        scores = torch.zeros(len(rows), device=accelerator.device)
        if has_hook(type(method), "score"):
            places = torch.arange(len(rows))
            mine = places.tensor_split(splits)[accelerator.process_index :: accelerator.num_processes]
            with evaluating(model):
                for batch, place in zip(
                    MicroBatches.of(rows, splits, data, accelerator, self.step.number + 1, stored=False),
                    mine,
                    strict=True,
                ):

                    def score(batch: Batch = batch) -> Tensor:
                        student = self.models.student_outputs(self.student, batch, Layers())
                        return method.score(self.step, batch, student)

                    values = model(run=score)
                    if len(place):
                        scores[place.to(scores.device)] = values.float()
        scores = accelerator.reduce(scores, "sum").cpu()  # type: ignore[union-attr]
        kept = method.select(self.step, rows, scores)
        if not len(kept):
            raise KdtrainError(f"method {method.options.name} selected no row at step {self.step.number + 1}")
        return kept

    def with_whole(
        self, model: nn.Module, batches: list[Batch], scales: Sequence[float], accelerator: Accelerator
    ) -> list[Batch]:
        """Run all micro-batches without a graph first, and give each the shared tensors of all.

        The random state is put back afterwards, so that the run with a graph draws the same dropout.
        """
        device = accelerator.device
        parts: list[dict[str, Tensor]] = []
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in batches:

                def share(batch: Batch = batch) -> dict[str, Tensor]:
                    student, teachers = self.outputs(batch)
                    return {
                        f"{number}.{name}": value
                        for number, method in enumerate(self.plan)
                        if method.needs().whole_batch
                        for name, value in method.share(
                            self.step, batch, student, {name: teachers[name] for name in method.teachers}
                        ).items()
                    }

                parts.append(model(run=share))
        wholes: dict[str, list[Shared]] = {}
        for name in parts[0]:
            # A filler is run for the sake of the random numbers and of FSDP2, and adds no row.
            own = [
                part[name][: len(part[name]) if scale else 0]
                for part, scale in zip(parts, scales, strict=True)
            ]
            values, first = gather_ragged(torch.cat(own), accelerator)
            wholes[name] = []
            for part, rows in zip(parts, own, strict=True):
                places = torch.arange(len(part[name]), device=device)
                wholes[name].append(Shared(values, places + first if len(rows) else places * 0))
                first += len(rows)
        return [
            replace(batch, whole={name: shared[i] for name, shared in wholes.items()})
            for i, batch in enumerate(batches)
        ]

    def combine(
        self, step: Step, gradients: list[list[Tensor]], values: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """One gradient out of those of all groups."""
        (method,) = self.plan
        return method.combine(step, gradients, values)

    def logged(self) -> dict[str, Tensor]:
        """What the methods log of this step."""
        return {name: value for method in self.plan for name, value in method.logged().items()}

    def after_step(self, step: Step, values: Callable[[], Mapping[str, Tensor]]) -> None:
        """Tell the methods that a step was taken; `values` is called only where one of them listens."""
        listening = [method for method in self.plan if has_hook(type(method), "after_step")]
        if listening:
            found = values()
            for method in listening:
                method.after_step(step, found)

    def after_evaluate(self, step: Step, metrics: Mapping[str, float]) -> None:
        """Tell the methods the metrics of an evaluation."""
        for method in self.plan:
            method.after_evaluate(step, metrics)


@dataclass(frozen=True)
class Sampling:
    """`generate` of `Method.make_batch`, for one micro-batch."""

    objective: Objective
    model: nn.Module
    """the objective as accelerate wrapped it"""
    accelerator: Accelerator
    filler: bool

    def __call__(self, sampler: Callable[[Any, Mapping[str, Any]], T]) -> T:
        """Run a sampler inside the wrapped forward, where FSDP2 gathers weights."""
        models = self.objective.models
        return self.model(run=lambda: sampler(self.objective.student, models.teachers))

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all processes."""
        return gather_ragged(values[:0] if self.filler else values, self.accelerator)[0]


def teacher_layers(methods: Sequence[Method], name: str) -> Layers:
    """The layers of a teacher that the methods read."""
    return merged([method for method in methods if name in method.teachers], side=1)


def merged(methods: Sequence[Method], *, side: int) -> Layers:
    """The layers of one side that the methods read; side 0 is the student."""
    needs = [method.needs() for method in methods]
    kinds = (
        [need.layers for need in needs],
        [need.tokens for need in needs],
        [need.attention for need in needs],
    )
    return Layers(*(tuple(sorted({pair[side] for pairs in kind for pair in pairs})) for kind in kinds))
