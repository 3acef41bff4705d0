"""Gradients that are written over the logits they are of."""

from torch import Tensor


def aliases_input(written: Tensor, read: Tensor) -> bool:
    """Whether `written` holds narrower numbers in the rows of `read`; memory that is shared in another way is refused."""
    if written.data_ptr() != read.data_ptr():
        if written.untyped_storage().data_ptr() == read.untyped_storage().data_ptr() and _overlap(
            written, read
        ):
            raise ValueError(
                "grad shares memory with the logits or features, so it must start where they do; got a start "
                f"{written.data_ptr() - read.data_ptr()} bytes after theirs"
            )
        return False
    if written.element_size() >= read.element_size():
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


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two (R, D) tensors of one storage, their last axes contiguous, have bytes in common."""
    starts = [tensor.data_ptr() for tensor in (one, other)]
    spans = [
        ((tensor.shape[0] - 1) * tensor.stride(0) + tensor.shape[1]) * tensor.element_size()
        for tensor in (one, other)
    ]
    if starts[0] >= starts[1] + spans[1] or starts[1] >= starts[0] + spans[0]:
        return False
    row, wide = (one.stride(0) * one.element_size(), other.stride(0) * other.element_size())
    if row != wide:
        return True
    # Columns of one buffer beside each other.
    place = (starts[0] - starts[1]) % row
    widths = [tensor.shape[1] * tensor.element_size() for tensor in (one, other)]
    return not (widths[1] <= place and place + widths[0] <= row)
