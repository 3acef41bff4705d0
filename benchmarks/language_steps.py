"""A whole training step of a code language model as `kdtrain` runs it, with and without the fused losses and the cache.

A step makes the batch, runs objective and backward, clips, and moves the weights: everything that `kdtrain.loop` does
between two lines of its log. Models have random weights and the text is random tokens: neither changes time or memory.
"""

import atexit
import itertools
import shutil
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operation import Operation, Step, training_step

if TYPE_CHECKING:
    from kdtrain.models.language_teacher import LanguageTeacher
    from kdtrain.objective import Objective
    from kdtrain.tasks.code_lm.packing import PackedRows
    from kdtrain.tasks.code_lm.teacher_outputs import TeacherRows

BATCHES = 4  # different batches that the steps take turns with


@dataclass(frozen=True)
class Case:
    """A batch of `rows` rows of `length` tokens, a Llama-like student and teacher (width, layers)."""

    rows: int = 4
    length: int = 256
    vocabulary: int = 32000
    width: int = 256
    layers: int = 4
    teacher_width: int = 512
    teacher_layers: int = 6
    precision: str = "float32"
    device: str = "cpu"

    @property
    def family(self) -> str:
        return "language_step"

    @property
    def name(self) -> str:
        return (
            f"training step of a code language model, {self.rows} rows of {self.length} tokens, student "
            f"{self.layers} x {self.width}, teacher {self.teacher_layers} x {self.teacher_width}, V={self.vocabulary}, "
            f"{self.precision}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


CPU = (Case(),)
GPU = (
    # Qwen2.5-Coder 0.5B under 1.5B, as far as shapes go; models, optimizers and eager logits of all contenders share a GPU.
    Case(4, 1024, 151936, 896, 24, 1536, 28, precision="bfloat16", device="cuda"),
)
SMOKE = (Case(2, 16, 600, 32, 1, 48, 1),)


@dataclass(frozen=True)
class Inputs:
    """Text; the models are made by each contender."""

    rows: "PackedRows"


def make_inputs(case: Case) -> Inputs:
    """Text for a few batches."""
    return Inputs(_rows(case, BATCHES * case.rows))


def _rows(case: Case, count: int) -> "PackedRows":
    """Rows of random tokens, each one document."""
    from kdtrain.tasks.code_lm.packing import PackedRows

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(case.vocabulary, (count, case.length), generator=generator, dtype=torch.int32)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    positions = torch.arange(case.length, dtype=torch.int32).expand(count, -1)
    return PackedRows(
        tokens=tokens.flatten(),
        labels=labels.flatten(),
        positions=positions.flatten(),
        starts=torch.arange(count) * case.length,
        lengths=torch.full((count,), case.length),
        counted=torch.full((count,), case.length - 1),
        pad_id=0,
    )


def _model(case: Case, width: int, layers: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = max(1, width // 64)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=case.length,
        tie_word_embeddings=True,
    )
    torch.manual_seed(width)
    with torch.device(case.device):  # a GPU draws a billion weights while a CPU draws ten million
        return AutoModelForCausalLM.from_config(config)


def _teacher(case: Case) -> "LanguageTeacher":
    from kdtrain.models.language_teacher import LanguageTeacher

    model = _model(case, case.teacher_width, case.teacher_layers)
    model.eval().requires_grad_(False).to(case.device, getattr(torch, case.precision))
    return LanguageTeacher("random weights", model, None)  # type: ignore[arg-type]


def _objective(case: Case, method: str, teacher: "LanguageTeacher | None", stored: Any = None) -> Any:
    from kdtrain.methods import build_methods, method_options
    from kdtrain.tasks.code_lm.outputs import LanguageModels
    from kdtrain.tasks.code_lm.task import checked_objective, shape_of

    student = _model(case, case.width, case.layers).train()
    options = method_options(method)
    if method != "ft":
        options = options.replaced(temperature=1.0, ce_weight=0.5)
    shapes = {} if teacher is None else {"teacher": shape_of(teacher.model)}
    methods = build_methods([options], "code_lm", shape_of(student), shapes)
    models = LanguageModels(teacher, tail="bucket" if stored is None else stored.tail)
    return checked_objective(student, methods, models).to(case.device)


def _autocast(case: Case) -> AbstractContextManager[Any]:
    if case.precision == "float32":
        return nullcontext()
    return torch.autocast(case.device, getattr(torch, case.precision))


def _step(case: Case, objective: "Objective", rows: "PackedRows | TeacherRows", loss_of: Any = None) -> Step:
    """The step of `kdtrain.loop`, in which `loss_of` may stand for the objective's own loss."""
    batches = itertools.cycle(torch.arange(BATCHES * case.rows).split(case.rows))

    def loss() -> Tensor:
        index = next(batches)
        batch = rows.batch(index, torch.device(case.device))
        with _autocast(case):
            return (loss_of or (lambda *given: objective(*given)[0]))(batch, rows.count(index))

    return training_step(objective, loss)


def plain(case: Case, inputs: Inputs) -> Step:
    """Next tokens only, fused: what every other row is compared with."""
    return _step(case, _objective(case, "ft", None), inputs.rows)


def kd(case: Case, inputs: Inputs) -> Step:
    """Forward KL and cross entropy, the teacher run in the step."""
    return _step(case, _objective(case, "kd", _teacher(case)), inputs.rows)


def kd_features(case: Case, inputs: Inputs) -> Step:
    """And the last hidden states behind a learned projection."""
    return _step(case, _objective(case, "kd_features", _teacher(case)), inputs.rows)


def _computed(
    case: Case,
    folder: Path,
    teacher: "LanguageTeacher",
    recipe: Any,
    kind: Literal["hidden", "topk"],
    rows: "PackedRows",
) -> "TeacherRows":
    from accelerate import Accelerator

    from kdtrain.tasks.code_lm.targets import Target
    from kdtrain.tasks.code_lm.teacher_outputs import TeacherRows

    target, accelerator = Target.of(kind, teacher, recipe), Accelerator(cpu=case.device == "cpu")
    tokens = case.rows * case.length
    return TeacherRows.computed(rows, folder, teacher, target, accelerator, batch_tokens=tokens)


def _stored(case: Case, inputs: Inputs, kind: Literal["hidden", "topk"]) -> Step:
    from kdtrain.recipe import LanguageTeacherSection

    teacher, recipe = _teacher(case), LanguageTeacherSection(path="random weights", signal=kind)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-cache-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # steps read from it until the process ends
    rows = _computed(case, folder, teacher, recipe, kind, inputs.rows)
    teacher.release()
    return _step(case, _objective(case, "kd", teacher, recipe), rows)


def stored_hidden(case: Case, inputs: Inputs) -> Step:
    """What enters the teacher's head comes from the cache."""
    return _stored(case, inputs, "hidden")


def stored_top_k(case: Case, inputs: Inputs) -> Step:
    """The teacher's 64 best tokens come from the cache."""
    return _stored(case, inputs, "topk")


def store(case: Case, inputs: Inputs) -> Step:
    """What the cache costs once for every batch: the teacher's pass, and its hidden states written to disk."""
    from kdtrain.recipe import LanguageTeacherSection

    teacher, rows = _teacher(case), _rows(case, case.rows)
    recipe = LanguageTeacherSection(path="random weights", signal="hidden")

    def step() -> Tensor:
        with tempfile.TemporaryDirectory(prefix="benchmark-cache-") as folder:
            _computed(case, Path(folder), teacher, recipe, "hidden", rows)
        return torch.zeros(())

    return step


def _eager_logits(objective: "Objective", batch: Any) -> Tensor:
    from kdtrain.models.heads import head_of, hidden_states

    hidden, _ = hidden_states(objective.student, batch.input_ids, batch.positions, ())  # type: ignore[arg-type]
    return F.linear(hidden, head_of(objective.student).weight).flatten(0, 1).float()  # type: ignore[arg-type]


def plain_eager(case: Case, inputs: Inputs) -> Step:
    """Next tokens only, logits whole."""
    objective = _objective(case, "ft", None)

    def loss(batch: Any, divisor: int) -> Tensor:
        return (
            F.cross_entropy(_eager_logits(objective, batch), batch.labels.flatten(), reduction="sum")
            / divisor
        )

    return _step(case, objective, inputs.rows, loss)


def eager(case: Case, inputs: Inputs) -> Step:
    """Forward KL and cross entropy, both logits whole: the lines that the fused loss replaces."""
    objective = _objective(case, "kd", _teacher(case))
    options = objective.plan[0].options

    def loss(batch: Any, divisor: int) -> Tensor:
        student, labels = _eager_logits(objective, batch), batch.labels.flatten()
        with torch.no_grad():
            known = objective.models.teacher_outputs(
                "teacher", batch, objective.teacher_layers["teacher"]
            ).target
            teacher = F.log_softmax(F.linear(known.hidden, known.weight).flatten(0, 1).float(), -1)
        kd = F.kl_div(F.log_softmax(student, -1), teacher, reduction="none", log_target=True).sum(-1)
        ce = F.cross_entropy(student, labels, reduction="sum")
        return (options.kd_weight * (kd * (labels != -100)).sum() + options.ce_weight * ce) / divisor

    return _step(case, objective, inputs.rows, loss)


OPERATION = Operation(
    case=Case,
    make_inputs=make_inputs,
    contenders={
        "plain": plain,
        "plain_eager": plain_eager,
        "kd": kd,
        "eager": eager,
        "kd_features": kd_features,
        "stored_hidden": stored_hidden,
        "stored_top_k": stored_top_k,
        "store": store,
    },
    leaves=lambda case, inputs: {},
    labels={
        "plain": "next tokens only",
        "plain_eager": "next tokens only, eager loss",
        "kd": "KD",
        "eager": "KD, eager losses",
        "kd_features": "KD + hidden states",
        "stored_hidden": "KD, teacher's hidden states from the cache",
        "stored_top_k": "KD, teacher's 64 best tokens from the cache",
        "store": "making the cache of hidden states, once for a batch",
    },
    tests=("tests/language/test_objective.py",),
    floor="plain",
    floor_name="x plain training",
    tokens=lambda case: case.rows * case.length,
)
