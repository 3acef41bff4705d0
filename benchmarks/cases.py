"""The losses between hidden states and heads: their cases, and inputs that look like those of trained models."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
# Kept entries of a top-k teacher.
KEPT = 64


@dataclass(frozen=True)
class Case:
    """One operation at one shape: loss and gradients of both student tensors, mean over the counted rows.

    Axes: N tokens, V vocabulary, D hidden width (student `width`, teacher `teacher_width`).
    """

    divergence: str
    tokens: int = 2048
    width: int = 256
    teacher_width: int = 512
    vocabulary: int = 32000
    dtype: str = "float32"
    masked: float = 0.0  # share of the rows whose label is ignored
    operation: str = "linear_kd"  # or linear_ce
    device: str = "cpu"
    teacher: str = "head"  # or logits, top_k, top_k_bucket, cross_term, none: what a step is given of it
    mode: str = "fast"
    chunk_rows: int | None = None  # of logits held at a time by ours; None is the default of the back end

    @property
    def family(self) -> str:
        return self.operation

    @property
    def name(self) -> str:
        masked = f", {self.masked:.0%} masked" if self.masked else ""
        masked += f", teacher as {self.teacher}" if self.teacher not in ("head", "none") else ""
        masked += f", {self.mode}" if self.mode != "fast" else ""
        masked += f", chunks of {self.chunk_rows} rows" if self.chunk_rows else ""
        widths = (
            f"D_s={self.width}, D_t={self.teacher_width}" if self.teacher != "none" else f"D={self.width}"
        )
        return f"{self.operation} {self.divergence}, N={self.tokens}, {widths}, V={self.vocabulary}, {self.dtype}{masked}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. The student's two require grad, except a frozen head; rows labelled -100 do not count."""

    student_hidden: Tensor  # (N, D_s)
    student_weight: Tensor  # (V, D_s)
    teacher_hidden: Tensor  # (N, D_t)
    teacher_weight: Tensor  # (V, D_t)
    labels: Tensor  # (N,) int64

    @property
    def counted(self) -> Tensor:
        return self.labels != IGNORE_INDEX


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Inputs whose logits look like those of trained models: a Zipf prior over tokens, and a student near its teacher.

    Both models see one latent meaning of each row and token; the student sees it through noise. The last column of the
    hidden states is 1 and carries the prior, as a head with a bias would.
    """
    device = torch.device(case.device)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rank = min(32, case.width - 1, case.teacher_width - 1)
    row_meaning, token_meaning = normal(case.tokens, rank), normal(case.vocabulary, rank) * (2.5 / rank**0.5)
    ranks = torch.randperm(case.vocabulary, generator=generator, device=device) + 1
    prior = (-ranks.float().log()).unsqueeze(1)

    def model(width: int, noise: float) -> tuple[Tensor, Tensor]:
        into_width = torch.linalg.qr(normal(width - 1, rank)).Q.T  # (rank, width - 1), rows orthonormal
        hidden = row_meaning @ into_width + noise * normal(case.tokens, width - 1)
        dtype = getattr(torch, case.dtype)
        hidden = torch.cat([hidden, hidden.new_ones(case.tokens, 1)], dim=1).to(dtype)
        # In place: every contender makes its inputs while the others make theirs, on one device.
        weight = normal(case.vocabulary, width - 1).mul_(noise / width**0.5)
        weight += token_meaning @ into_width
        whole = torch.empty(case.vocabulary, width, dtype=dtype, device=device)
        whole[:, :-1], whole[:, -1:] = weight, prior
        return hidden, whole

    student_hidden, student_weight = model(case.width, noise=0.2)
    teacher_hidden, teacher_weight = model(case.teacher_width, noise=0.0)
    labels = torch.randint(case.vocabulary, (case.tokens,), generator=generator, device=device)
    labels[torch.rand(case.tokens, generator=generator, device=device) < case.masked] = IGNORE_INDEX
    return Inputs(
        student_hidden.requires_grad_(),
        student_weight.requires_grad_(case.teacher != "cross_term"),
        teacher_hidden,
        teacher_weight,
        labels,
    )
