"""The test set-up itself: what conftest.py promises, checked where it could quietly stop holding."""

import warnings

import pytest
import torch


# One factory of each kind that the packages call, in the dtypes they compute in.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scratch_memory_is_nan_until_written(dtype: torch.dtype) -> None:
    like = torch.zeros(3, 5, dtype=dtype)
    for scratch in (
        torch.empty(3, 5, dtype=dtype),
        torch.empty((3, 5), dtype=dtype),
        torch.empty(3, 5, out=torch.zeros(3, 5, dtype=dtype)),
        torch.empty_like(like),
        torch.empty_strided((3, 5), (7, 1), dtype=dtype),
        like.new_empty(3, 5),
        like.new_empty_strided((3, 5), (7, 1)),
        torch.empty(3, 5, dtype=dtype, requires_grad=True),
    ):
        assert scratch.shape == (3, 5)
        assert scratch.isnan().all()


def test_scratch_memory_is_nan_in_backward() -> None:
    class LeavesGradientUnwritten(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(grad)

    x = torch.ones(4, requires_grad=True)
    torch.autograd.backward(LeavesGradientUnwritten.apply(x).sum())
    assert x.grad is not None and x.grad.isnan().all()


def test_integer_scratch_still_works() -> None:
    assert torch.empty(4, dtype=torch.int64).shape == (4,)
    assert torch.empty(4, device="meta").is_meta


def test_warnings_are_errors() -> None:
    with pytest.raises(UserWarning, match="said once"):
        warnings.warn("said once", UserWarning, stacklevel=1)


def test_triton_runs_in_its_interpreter_without_a_device() -> None:
    triton = pytest.importorskip("triton")
    assert triton.knobs.runtime.interpret == (not torch.cuda.is_available())


def test_nothing_is_fetched() -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info("roberta-base")
