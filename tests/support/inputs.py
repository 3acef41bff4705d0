"""Students, teachers, labels and sizes for the tests of the losses, and the fair eager baseline."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import (
    JSD,
    TVD,
    AlphaBeta,
    ChiSquared,
    Decoupled,
    Divergence,
    ForwardKL,
    Renyi,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TeacherHead,
    kd_loss,
    linear_kd_loss,
)
from kdkernels.options import Impl
from tests.support.rounding import Truth, truths

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Every back end passes the same tests. On a machine without a GPU triton runs in its interpreter.
IMPLS: list[Impl] = ["reference", "torch", "triton"]
FAST_IMPLS: list[Impl] = ["torch", "triton"]


# Decoupled, which needs labels, has its own tests; so have the limits of AlphaBeta.
DIVERGENCES: list[Divergence] = [
    ForwardKL(),
    ReverseKL(),
    JSD(0.5),
    JSD(0.2),
    SkewKL(0.1),
    SkewReverseKL(0.2),
    TVD(),
    AlphaBeta(0.3, 0.6),
    ChiSquared(),
    Renyi(0.6),
    Renyi(2.0),
]

# Those that tiles and shards of the vocabulary take.
TILED = [divergence for divergence in DIVERGENCES if divergence.properties.adds_over_tiles]


@dataclass(frozen=True)
class Case:
    """The tensors of one `linear_kd_loss` call."""

    student_hidden: Tensor  # (N, D_s)
    student_weight: Tensor  # (V, D_s)
    student_bias: Tensor  # (V,)
    teacher_hidden: Tensor  # (N, D_t)
    teacher_weight: Tensor  # (V, D_t)
    teacher_bias: Tensor  # (V,)
    labels: Tensor  # (N,) with some -100

    @property
    def teacher(self) -> TeacherHead:
        """The teacher as hidden states and a head."""
        return TeacherHead(self.teacher_hidden, self.teacher_weight, self.teacher_bias)

    @property
    def student_logits(self) -> Tensor:
        """(N, V) in the case's dtype."""
        return F.linear(self.student_hidden, self.student_weight, self.student_bias)

    @property
    def teacher_logits(self) -> Tensor:
        """(N, V) in the case's dtype."""
        return F.linear(self.teacher_hidden, self.teacher_weight, self.teacher_bias)

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another dtype."""
        moved = {name: tensor.to(dtype) for name, tensor in vars(self).items() if name != "labels"}
        return replace(self, **moved)

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh leaves for student hidden states, weight and bias."""
        student = (self.student_hidden, self.student_weight, self.student_bias)
        hidden, weight, bias = (tensor.detach().clone().requires_grad_() for tensor in student)
        return hidden, weight, bias


def make_case(
    rows: int = 13,
    vocabulary: int = 67,
    student_width: int = 8,
    teacher_width: int = 12,
    dtype: torch.dtype = torch.float32,
    ignored_every: int | None = 4,
) -> Case:
    """Random tensors; the student's logits spread by about 3, the teacher's by about 2.

    The defaults are ragged on purpose: no size is a multiple of a tile or of another size.
    """

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(DEVICE, dtype)

    labels = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    if ignored_every is not None:
        labels[::ignored_every] = -100
    return Case(
        normal(rows, student_width),
        normal(vocabulary, student_width),
        normal(vocabulary),
        normal(rows, teacher_width),
        normal(vocabulary, teacher_width, scale=0.6),
        normal(vocabulary),
        labels,
    )


def eager_divergence(log_p_s: Tensor, log_p_t: Tensor, divergence: Divergence) -> Tensor:
    """What people write by hand for two log-distributions (N, V): one value per row."""
    p_s, p_t = log_p_s.exp(), log_p_t.exp()

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    def log_mix(teacher_share: float) -> Tensor:
        mixture = teacher_share * p_t + (1.0 - teacher_share) * p_s
        return mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()

    if isinstance(divergence, ForwardKL):
        return kl(log_p_t, log_p_s)
    if isinstance(divergence, ReverseKL):
        return kl(log_p_s, log_p_t)
    if isinstance(divergence, JSD):
        beta = divergence.beta
        return beta * kl(log_p_t, log_mix(beta)) + (1.0 - beta) * kl(log_p_s, log_mix(beta))
    if isinstance(divergence, SkewKL):
        return kl(log_p_t, log_mix(divergence.alpha))
    if isinstance(divergence, SkewReverseKL):
        return kl(log_p_s, log_mix(1.0 - divergence.alpha))
    if isinstance(divergence, TVD):
        return (p_s - p_t).abs().sum(-1) / 2
    if isinstance(divergence, ChiSquared):
        return ((p_t - p_s).square() / p_s).sum(-1)
    if isinstance(divergence, Renyi):
        a = divergence.alpha
        return (a * log_p_t + (1.0 - a) * log_p_s).logsumexp(-1) / (a - 1.0)
    assert isinstance(divergence, AlphaBeta), "Decoupled needs labels"
    a, b = divergence.alpha, divergence.beta
    assert a * b * (a + b) != 0, "the limits have their own test"
    # Powers of log-probabilities: those of probabilities would lose what underflows.
    product = (a * log_p_t + b * log_p_s).exp().sum(-1)
    teacher, student = ((a + b) * log_p_t).exp().sum(-1), ((a + b) * log_p_s).exp().sum(-1)
    return -(product - a / (a + b) * teacher - b / (a + b) * student) / (a * b)


def eager_row_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """What people write by hand, in the dtype of the logits: one loss per row, 0 in rows labelled -100."""
    log_p_s = F.log_softmax(student_logits / temperature, -1)
    log_p_t = F.log_softmax(teacher_logits / temperature, -1)
    if isinstance(divergence, Decoupled):
        assert labels is not None
        value = eager_decoupled(log_p_s, log_p_t, labels, divergence)
    else:
        value = eager_divergence(log_p_s, log_p_t, divergence)
    loss = kd_weight * temperature**2 * value
    if labels is None:
        return loss
    if ce_weight != 0.0:
        ce = F.cross_entropy(student_logits, labels, reduction="none", label_smoothing=label_smoothing)
        loss = loss + ce_weight * ce
    return loss.masked_fill(labels == -100, 0.0)


def eager_decoupled(log_p_s: Tensor, log_p_t: Tensor, labels: Tensor, divergence: Decoupled) -> Tensor:
    """DKD row by row: the label against the rest, and the rest among themselves."""
    values = []
    for log_s, log_t, label in zip(log_p_s, log_p_t, labels.tolist(), strict=True):
        label = max(label, 0)
        rest_s, rest_t = (torch.cat((row[:label], row[label + 1 :])) for row in (log_s, log_t))
        two_s, two_t = (
            torch.stack((row[label], rest.logsumexp(0))) for row, rest in ((log_s, rest_s), (log_t, rest_t))
        )
        target = (two_t.exp() * (two_t - two_s)).sum()
        q_s, q_t = rest_s.log_softmax(0), rest_t.log_softmax(0)
        values.append(divergence.target * target + divergence.non_target * (q_t.exp() * (q_t - q_s)).sum())
    return torch.stack(values)


def eager_linear_kd(case: Case, labels: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    """Row losses, their mean over counted rows, and its gradients for student hidden, weight and bias."""
    hidden, weight, bias = case.leaves()
    rows = eager_row_losses(F.linear(hidden, weight, bias), case.teacher_logits, labels, **options)
    mean = rows.sum() / (rows.numel() if labels is None else int((labels != -100).sum()))
    return rows.detach(), mean.detach(), *torch.autograd.grad(mean, (hidden, weight, bias))


def true_linear_kd(case: Case, labels: Tensor | None, **options: Any) -> tuple[Truth, ...]:
    """`eager_linear_kd` in float64, with the error that float32 has to expect."""
    exact = case.to(torch.float64)
    return truths(lambda: eager_linear_kd(exact, labels, **options))


def loss_and_gradients(
    case: Case,
    labels: Tensor | None,
    impl: Impl,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    **options: Any,
) -> tuple[Tensor, ...]:
    """`linear_kd_loss` with teacher head and biases, and its gradients for hidden, weight and bias."""
    hidden, weight, bias = case.leaves()
    loss = linear_kd_loss(
        hidden, weight, case.teacher, labels, student_bias=bias, impl=impl, reduction=reduction, **options
    )
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))


def solve(student: Tensor, teacher: Tensor, impl: Impl, **options) -> tuple[Tensor, Tensor]:
    """Row losses of `kd_loss` and the gradient of their sum."""
    student = student.detach().clone().requires_grad_()
    rows = kd_loss(student, teacher, reduction="none", impl=impl, **options)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    return rows.detach(), gradient
