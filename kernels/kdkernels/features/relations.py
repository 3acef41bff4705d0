"""The loss between two models' relations of tokens to tokens: `relation_kl`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import checks
from ..core.autograd import Tensors, reduce_rows
from ..core.backend import Backend, load_backend, resolve_impl
from ..core.dispatch import row_loss, traceable
from ..core.matmul import accum_dtype, autocast_dtype, autocast_off
from ..core.rows import row_weights
from ..options import Impl, Reduction
from ..reference.features import relation_row_losses
from .checks import check_relations


@traceable
def relation_kl(
    student_q: Tensor,
    teacher_q: Tensor,
    student_k: Tensor | None = None,
    teacher_k: Tensor | None = None,
    *,
    heads: int | tuple[int, int],
    mask: Tensor | None = None,
    causal: bool = False,
    reduction: Reduction = "mean",
    impl: Impl | None = None,
) -> Tensor:
    """KL divergence from the teacher's relations of tokens to tokens to the student's, head by head.

    Replaces, without any map of N x N numbers in memory (without keys, `k` is `q`):

        def log_relations(q, k):                                                             # (B, N, D) each
            q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))             # (B, heads, N, d)
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
            return F.log_softmax(scores.masked_fill(~mask[:, None, None, :], -1e9), -1)
        teacher, student = log_relations(teacher_q, teacher_k), log_relations(student_q, student_k)
        kl = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)           # (B, heads, N)
        loss = kl.mean(1)[mask].mean()

    With queries and keys these are attention maps; with queries, keys or values alone the relations of one kind to itself.

    Args:
        student_q: (B, N, D_s) queries, keys, values or any features; float16, bfloat16, float32 or float64.
        teacher_q: (B, N, D_t), frozen. The same tokens; its width and its dtype may differ.
        student_k: (B, N, D_s) keys that the queries are compared with; None compares `student_q` with itself.
        teacher_k: (B, N, D_t), frozen; given exactly when `student_k` is.
        heads: into how many relation heads the widths are cut, of D / heads columns each; they need not be the heads
            that the models attend with. A pair counts the student's and the teacher's heads when these differ: each head
            of the side with fewer is then compared with as many neighbouring heads of the other.
        mask: (B, N) bool, True for valid tokens; masked ones are neither keys nor queries. None takes all.
        causal: a token is compared with itself and those before it only.
        reduction: "mean" divides by valid tokens times (pairs of) heads; "sum" adds all up; "none" gives the sum over
            heads of each token, shape (B, N), 0 where the mask is False.
        impl: None takes triton for CUDA and ROCm tensors, torch elsewhere; "reference" is eager float32. Triton takes
            heads of at most 256 columns, in float32 of at most 128.

    Returns:
        Tensor: float32 (float64 for float64 features): 0-D, or (B, N) for reduction="none". A mask without a True returns
            a finite 0 with a graph.

    Gradients reach student_q and student_k in their own dtypes. The loss has no second derivative. Under autocast,
    features are cast as the matmuls of an attention would cast them.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; heads that do not divide a width; a teacher that
            requires grad.

    Source: Wang et al., MiniLM, 2020, equations 5 to 7 (attention and value relations); Wang et al., MiniLMv2, 2021,
    equations 4 to 6 (query, key and value relations with relation heads).
    """
    checks.check_reduction(reduction, None)
    checks.check_impl(impl)
    checks.check_flag("causal", causal)
    counts = check_relations(student_q, teacher_q, student_k, teacher_k, heads, mask)
    impl = resolve_impl(impl, student_q.device, student_q.dtype)
    # Whole numbers also under a compiler that would leave them open: a graph is for one shape.
    batch, length = int(student_q.shape[0]), int(student_q.shape[1])
    pairs = max(counts)
    cast = autocast_dtype(student_q)
    with autocast_off(student_q):
        counted = row_weights(
            batch * length,
            None if mask is None else mask.reshape(-1),
            None,
            None,
            student_q.device,
            accum_dtype(student_q.dtype),
        )
        denominator = counted.denominator * pairs
        features = (student_q, teacher_q, student_k, teacher_k)
        if impl == "reference":
            q_s, q_t, k_s, k_t = (
                side if side is None or cast is None else side.to(cast) for side in features
            )
            assert q_s is not None and q_t is not None
            values = relation_row_losses(q_s, q_t, k_s, k_t, mask, counts, causal).reshape(-1)
            loss = reduce_rows(values, counted.weight, denominator, reduction)
        else:
            half = torch.float16 in (student_q.dtype, cast)
            solver = RelationKL(
                load_backend(impl), (batch, length), counts, causal, cast, 1.0 if half else None
            )
            loss = row_loss(
                solver,
                (*(None if side is None else side.reshape(-1, side.shape[2]) for side in features), mask),
                counted.weight,
                denominator,
                reduction,
                # A back end that keeps statistics of the rows finds the gradient in backward, as flash attention does.
                gradient_in_forward=solver.state_size == 0,
            )
    return loss.reshape(batch, length) if reduction == "none" else loss


@dataclass(frozen=True)
class RelationKL:
    """`relation_kl` as rows: tensors are student and teacher q (B * N, D), student and teacher k, mask (B, N)."""

    backend: Backend
    shape: tuple[int, int]  # B, N
    heads: tuple[int, int]  # student, teacher
    causal: bool
    autocast: torch.dtype | None
    fp16_bound: float | None

    @property
    def state_size(self) -> int:
        """Numbers of a token that values keep for the gradients."""
        return self.backend.RELATION_STATE * max(self.heads)

    def values(self, tensors: Tensors, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B * N,) sums over heads, and the statistics of the rows."""
        values, _, statistics = self._rows(tensors, None, (False, False), None)
        assert statistics is not None
        return values.flatten(), statistics.view(self.state_size, self.shape[0] * self.shape[1])

    def gradients(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...], state: Tensor
    ) -> Tensors:
        """The gradients of the student's q and k."""
        statistics = state.view(self.backend.RELATION_STATE, self.shape[0], max(self.heads), self.shape[1])
        _, (d_q, d_k), _ = self._rows(tensors, weight, (needs[0], needs[2]), statistics)
        return d_q, None, d_k, None, None

    def solve(
        self, tensors: Tensors, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensors]:
        """(B * N,) sums over heads and the gradients of the student's q and k."""
        values, (d_q, d_k), _ = self._rows(tensors, weight, (needs[0], needs[2]), None)
        return values.flatten(), (d_q, None, d_k, None, None)

    def _rows(
        self, tensors: Tensors, weight: Tensor | None, wanted: tuple[bool, bool], statistics: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None], Tensor | None]:
        """(B, N) sums over heads, gradients (B * N, D) as wanted, and the statistics of the rows."""
        *features, mask = tensors
        student_q, teacher_q, student_k, teacher_k = (
            None if side is None else side.to(self.autocast or side.dtype).unflatten(0, self.shape)
            for side in features
        )
        assert student_q is not None and teacher_q is not None
        values, gradients, statistics = self.backend.relation_rows(
            (student_q, student_q if student_k is None else student_k),
            (teacher_q, teacher_q if teacher_k is None else teacher_k),
            mask,
            self.heads,
            self.causal,
            row_weight=weight.view(self.shape) if weight is not None and any(wanted) else None,
            needs=wanted,
            statistics=statistics,
        )
        d_q, d_k = (None if side is None else side.flatten(0, 1) for side in gradients)
        return values, (d_q, d_k), statistics
