"""Held-out metrics of a language model, out of the sums of every row."""

import math

from torch import Tensor


def language_metrics(sums: Tensor, *, teacher: bool) -> dict[str, float]:
    """Metrics out of (rows, 4) sums as `LanguageModels.measure` has them.

    Returns:
        loss (mean cross entropy in nats of the counted tokens), perplexity, and with a teacher divergence (forward KL
        at temperature 1, mean over the tokens) and agreement (share of tokens with the same best token).
    """
    ce, divergence, agreement, count = sums.sum(0).tolist()
    loss = ce / count
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 80.0))}
    if teacher:
        metrics |= {"divergence": divergence / count, "agreement": agreement / count}
    return metrics
