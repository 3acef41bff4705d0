"""What a row kernel is compiled for, and how a launch finds it out. Numbers that users set are never here."""

from typing import Literal, NamedTuple

from torch import Tensor

from ...divergences import Decoupled
from ...options import LogitTransform, RowTerms
from .divergence import NEEDS_MEAN_PASS, kernel_divergence

Transform = Literal["none", "scale", "softcap"]

# Divergences whose plain code was compiled without a spill, and with fewer registers, when nothing was said. Reverse KL
# is none of them: left alone, Triton 3.7.1 gives it 48 registers on sm_90 and spills two words (2026-11-22).
FITS_DEFAULT_REGISTERS = frozenset({"forward_kl", "jsd"})


class RowFlags(NamedTuple):
    """One compile-time constant of a kernel: each field stands for code that is or is not there."""

    divergence: str  # a name of `divergence.kernel_divergence`
    needs_mean_pass: bool = False  # both normalisers are needed before the mean slope: three passes
    has_labels: bool = False  # labels are read
    has_ce: bool = False
    # Sum of the student's exponentials at T = 1: the divergence's own, one from the same maximum, or one of its own over
    # all of the student's columns, where the divergence leaves some out.
    ce_sum: Literal["shared", "at_one", "own"] = "shared"
    has_smoothing: bool = False
    has_student_bias: bool = False
    has_teacher_bias: bool = False
    student_transform: Transform = "none"
    teacher_transform: Transform = "none"
    vocab_map: Literal["none", "prefix", "index"] = "none"
    has_row_weight: bool = False
    write_grad: bool = False
    aliased: bool = False  # grad holds narrower numbers in the student's own row
    # Whether the numbers that the gradient needs of a row are kept, or are there from an earlier launch for the values.
    state: Literal["none", "save", "load"] = "none"

    @property
    def fits_default_registers(self) -> bool:
        """Whether the code leaves the choice of registers to the compiler: see `launch.RowConfig`."""
        return (
            self.divergence in FITS_DEFAULT_REGISTERS
            and not self.has_smoothing
            and self.student_transform == self.teacher_transform == self.vocab_map == "none"
        )


def row_flags(
    terms: RowTerms,
    *,
    labels: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    row_weight: Tensor | None,
    vocab_map: int | Tensor | None,
    write_grad: bool,
    aliased: bool,
    state: Literal["none", "save", "load"] = "none",
) -> RowFlags:
    """The flags of a call of `kd_rows`."""
    name = kernel_divergence(terms.divergence).name
    has_ce = labels is not None and terms.ce_weight != 0.0
    ce_sum = "shared"
    if has_ce and (vocab_map is not None or name == "decoupled"):
        ce_sum = "own"
    elif has_ce and terms.temperature != 1.0:
        ce_sum = "at_one"
    return RowFlags(
        divergence=name,
        needs_mean_pass=name in NEEDS_MEAN_PASS,
        has_labels=has_ce or isinstance(terms.divergence, Decoupled),
        has_ce=has_ce,
        ce_sum=ce_sum,
        has_smoothing=has_ce and terms.label_smoothing != 0.0,
        has_student_bias=student_bias is not None,
        has_teacher_bias=teacher_bias is not None,
        student_transform=transform_name(terms.student_transform),
        teacher_transform=transform_name(terms.teacher_transform),
        vocab_map="none" if vocab_map is None else "index" if isinstance(vocab_map, Tensor) else "prefix",
        has_row_weight=row_weight is not None,
        write_grad=write_grad,
        aliased=aliased,
        state=state,
    )


def transform_name(transform: LogitTransform) -> Transform:
    """Which code a transform needs."""
    if transform.softcap is not None:
        return "softcap"
    return "none" if transform.is_identity else "scale"


def transform_numbers(transform: LogitTransform) -> tuple[float, float]:
    """(slope, softcap) of softcap * tanh(slope * z), or of slope * z with a softcap of 1."""
    if transform.softcap is None:
        return transform.scale, 1.0
    return transform.scale / transform.softcap, transform.softcap
