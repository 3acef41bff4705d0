"""Every operation that can be measured, by the family of its cases."""

from benchmarks import (
    contextual,
    cross_entropy,
    features,
    given_logits,
    language_steps,
    linear_kd,
    study_steps,
)
from benchmarks.operation import AnyCase, Operation

OPERATIONS: dict[str, Operation] = {
    "linear_kd": linear_kd.OPERATION,
    "linear_ce": cross_entropy.OPERATION,
    "kd": given_logits.OPERATION,
    "features": features.OPERATION,
    "contextual": contextual.OPERATION,
    "language_step": language_steps.OPERATION,
    "study_step": study_steps.OPERATION,
}


def operation_of(case: AnyCase) -> Operation:
    """The operation that a case belongs to."""
    return OPERATIONS[case.family]
