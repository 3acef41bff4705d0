"""Students, teachers, labels and sizes for the tests of the losses, and the fair eager baseline."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import JSD, ForwardKL, ReverseKL, TeacherHead, linear_kd_loss
from kdkernels.options import Impl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Every back end passes the same tests. On a machine without a GPU triton runs in its interpreter.
IMPLS: list[Impl] = ["reference", "torch", "triton"]
FAST_IMPLS: list[Impl] = ["torch", "triton"]

DIVERGENCES = [ForwardKL(), ReverseKL(), JSD(0.5), JSD(0.2)]


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


def eager_row_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    *,
    divergence: ForwardKL | ReverseKL | JSD,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Tensor:
    """What people write by hand, in the dtype of the logits: one loss per row, 0 in rows labelled -100."""
    log_p_s = F.log_softmax(student_logits / temperature, -1)
    log_p_t = F.log_softmax(teacher_logits / temperature, -1)

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    if isinstance(divergence, ForwardKL):
        value = kl(log_p_t, log_p_s)
    elif isinstance(divergence, ReverseKL):
        value = kl(log_p_s, log_p_t)
    else:
        beta = divergence.beta
        mixture = beta * log_p_t.exp() + (1.0 - beta) * log_p_s.exp()
        log_m = mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()
        value = beta * kl(log_p_t, log_m) + (1.0 - beta) * kl(log_p_s, log_m)
    loss = kd_weight * temperature**2 * value
    if labels is None:
        return loss
    if ce_weight != 0.0:
        loss = loss + ce_weight * F.cross_entropy(student_logits, labels, reduction="none")
    return loss.masked_fill(labels == -100, 0.0)


def eager_linear_kd(case: Case, labels: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    """Row losses and the gradients of their mean over counted rows for student hidden, weight and bias."""
    hidden, weight, bias = case.leaves()
    rows = eager_row_losses(F.linear(hidden, weight, bias), case.teacher_logits, labels, **options)
    count = rows.numel() if labels is None else int((labels != -100).sum())
    return rows.detach(), *torch.autograd.grad(rows.sum() / count, (hidden, weight, bias))


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
