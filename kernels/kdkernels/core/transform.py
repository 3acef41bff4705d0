"""What makes logits of a head's output: bias, scale and softcap, written once for all that is not a Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import LogitTransform


def transformed_logits(
    output: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    scratch: Tensor,
    derivative: Tensor | None = None,
) -> Tensor:
    """Logits after bias, scale and softcap, in `scratch`; `output` itself where there is none of them.

    `scratch` may be `output`. `derivative` receives the softcap's part of d(logit)/d(output), 1 - tanh^2.
    """
    logits = output if output.dtype == scratch.dtype else scratch.copy_(output)
    if bias is not None:
        logits = torch.add(logits, bias, out=scratch)
    if transform.softcap is not None:
        torch.tanh(torch.mul(logits, transform.scale / transform.softcap, out=scratch), out=scratch)
        if derivative is not None:
            torch.mul(scratch, scratch, out=derivative).neg_().add_(1.0)
        return scratch.mul_(transform.softcap)
    return logits if transform.scale == 1.0 else torch.mul(logits, transform.scale, out=scratch)
