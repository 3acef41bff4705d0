"""What becomes of the state of rows (`core.row_state`) whose tiles of the vocabulary have all been seen.

A back end fills the state with `tile_statistics` over all tiles, then `tile_sums` over all tiles once the normalisers are
final, then writes the gradient of each tile with `tile_gradient`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.labels import BinaryKL, cross_entropy
from ..core.row_state import CE_MAX, CE_SUM, LABEL, LOGIT_SUM, VALUE
from ..options import RowTerms


def needs_sums_first(terms: RowTerms) -> bool:
    """The gradient needs MEAN, so all tiles have to be summed before the first gradient is written."""
    return terms.divergence.properties.needs_mean


def finish(
    state: Tensor,
    labels: Tensor | None,
    terms: RowTerms,
    *,
    vocabulary: int,
    decoupled: tuple[Tensor, Tensor] | None = None,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence and cross entropy (R,) of rows whose tiles have all been seen twice."""
    kd, ce = state[VALUE].clone(), torch.zeros_like(state[VALUE])
    if decoupled is not None:
        of_target = BinaryKL.of_state(state, terms.temperature).divergence()
        kd = (decoupled[0] * of_target + decoupled[1] * kd).to(state.dtype)
    if labels is not None and terms.ce_weight != 0.0:
        smoothing = terms.label_smoothing
        # Differences of logits first: they are small where the logits are large.
        mean = None if smoothing == 0.0 else state[LOGIT_SUM] / vocabulary - state[CE_MAX]
        ce = cross_entropy(state[CE_SUM].log(), state[LABEL] - state[CE_MAX], mean, smoothing)
    if row_weight is not None:
        kd, ce = kd.masked_fill(row_weight == 0, 0.0), ce.masked_fill(row_weight == 0, 0.0)
    return kd, ce
