"""A bidirectional GRU layer on the CPU, step by step, with its own backward.

`nn.GRU` on a CPU leaves backward to autograd: some ten nodes a step and direction, each with small tensors. Here both
directions take a step together, each step is a handful of calls into memory that is there, what backward needs of the
gates is made for all steps at once, and the gradients of the weights are one product over all steps. cuDNN does the
like on a GPU, so this serves the CPU only.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence

GRU_WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


@dataclass(frozen=True)
class PackedSteps:
    """How the rows of a PackedSequence lie: step by step, the longest row first."""

    sizes: list[int]
    """rows that are still there at each step"""
    mirror: Tensor
    """(tokens,) int64: where token i of a row lies, there its token i from the end"""
    lasts: Tensor
    """(rows,) int64, the last token of each row, rows in the order in which they came"""
    firsts: Tensor
    """(rows,) int64, the first token of each"""

    @classmethod
    def of(cls, packed: PackedSequence) -> "PackedSteps":
        """Work it out from the number of rows at each step."""
        sizes = packed.batch_sizes
        starts = sizes.cumsum(0) - sizes
        steps = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        rows = torch.arange(len(steps)) - starts[steps]
        lengths = torch.bincount(rows)
        order = packed.unsorted_indices
        firsts = torch.arange(len(lengths)) if order is None else order
        lasts = starts[lengths[firsts] - 1] + firsts
        return cls(sizes.tolist(), starts[lengths[rows] - 1 - steps] + rows, lasts, firsts)

    def ends(self, data: Tensor) -> Tensor:
        """(rows, 2 H): the forward half after the last token joined with the backward half after the first."""
        forward, backward = data.chunk(2, dim=1)
        return torch.cat([forward[self.lasts], backward[self.firsts]], dim=1)


def bigru_layer(layer: nn.GRU, data: Tensor, steps: PackedSteps) -> Tensor:
    """What `nn.GRU(bidirectional=True)` says of packed rows, (tokens, 2 H); the second half is the backward direction's.

    Args:
        layer: one bidirectional layer, with biases.
        data: (tokens, D) as the PackedSequence holds them.
        steps: how they lie.
    """
    weights = [torch.stack([getattr(layer, name), getattr(layer, f"{name}_reverse")]) for name in GRU_WEIGHTS]
    input_weight, hidden_weight, input_bias, hidden_bias = weights
    # (2, tokens, 3 H): the share of the input in all gates; the second direction in its own order of steps.
    gates = torch.stack(
        [
            nn.functional.linear(data, input_weight[0], input_bias[0]),
            nn.functional.linear(data, input_weight[1], input_bias[1]).index_select(0, steps.mirror),
        ]
    )
    states: Any = _Steps.apply(gates, hidden_weight, hidden_bias, steps.sizes)
    return torch.cat([states[0], states[1].index_select(0, steps.mirror)], dim=1)


class _Steps(torch.autograd.Function):
    """All steps of both directions: gates (2, tokens, 3 H) to states (2, tokens, H)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, gates: Tensor, weight: Tensor, bias: Tensor, sizes: list[int]) -> Tensor:
        width = weight.shape[2]
        gate_bias, new_bias = bias[:, None].split([2 * width, width], dim=2)
        gates = gates.clone()
        reset, update, new = gates.split(width, dim=2)
        both = gates[:, :, : 2 * width].add_(gate_bias)
        hidden_new = torch.empty_like(new)  # the hidden share of the new state; backward needs it again
        states = torch.empty_like(hidden_new)
        before = gates.new_zeros(2, sizes[0], width)
        turned = weight.transpose(1, 2).contiguous()
        first = 0
        for size in sizes:
            here = slice(first, first + size)
            share = torch.bmm(before[:, :size], turned)
            both[:, here].add_(share[..., : 2 * width]).sigmoid_()
            now = torch.add(share[..., 2 * width :], new_bias, out=hidden_new[:, here])
            new[:, here].addcmul_(reset[:, here], now).tanh_()
            before = torch.lerp(new[:, here], before[:, :size], update[:, here], out=states[:, here])
            first += size
        ctx.save_for_backward(gates, hidden_new, states, weight)
        ctx.sizes = sizes
        return states

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gates, hidden_new, states, weight = ctx.saved_tensors
        sizes: list[int] = ctx.sizes
        width = weight.shape[2]
        reset, update, new = gates.split(width, dim=2)
        previous = _previous(states, sizes)
        # With g the gradient of a state: d new = g (1 - update) (1 - new^2), d update = g (before - new) update (1 - update),
        # d reset = d new * hidden_new * reset (1 - reset); of the hidden share of the new state d new * reset.
        factors = torch.empty_like(gates)
        by_reset, by_update, by_new = factors.split(width, dim=2)
        inner = (1 - update) * (1 - new * new)
        by_reset.copy_(inner * hidden_new * reset * (1 - reset))
        by_update.copy_((previous - new) * update * (1 - update))
        by_new.copy_(inner * reset)
        factors = factors.unflatten(2, (3, width))
        of_states = gradient.clone()
        carried = states.new_zeros(2, sizes[0], width)
        last = states.shape[1]
        for size in reversed(sizes):
            here = slice(last - size, last)
            now = of_states[:, here].add_(carried[:, :size])
            share = factors[:, here].mul_(now[:, :, None])
            torch.bmm(share.flatten(2), weight, out=carried[:, :size]).addcmul_(now, update[:, here])
            last -= size
        of_hidden = factors.flatten(2)
        of_gates = torch.cat([of_hidden[..., : 2 * width], of_states * inner], dim=2)
        return of_gates, of_hidden.transpose(1, 2) @ previous, of_hidden.sum(dim=1), None


def _previous(states: Tensor, sizes: list[int]) -> Tensor:
    """The state that each step began with: 0 at the first, then what the step before left for the same row."""
    previous = torch.zeros_like(states)
    first = 0
    for before, size in itertools.pairwise(sizes):
        start = first + before
        previous[:, start : start + size] = states[:, first : first + size]
        first = start
    return previous
