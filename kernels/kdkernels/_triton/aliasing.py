"""Gradients that are written over the logits they are of."""

from torch import Tensor


def lies_over(written: Tensor, read: Tensor) -> bool:
    """Whether `written` holds narrower numbers in the rows of `read`."""
    if written.data_ptr() != read.data_ptr() or written.element_size() >= read.element_size():
        return False
    strides = (
        written.stride(0) * written.element_size(),
        read.stride(0) * read.element_size(),
    )
    if strides[0] != strides[1]:
        raise ValueError(
            f"grad shares memory with student_logits, so its rows must start where theirs do; got row strides of "
            f"{strides[0]} and {strides[1]} bytes"
        )
    return True
