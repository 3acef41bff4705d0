"""ATKD (arXiv 2402.11890) against its formula token by token in float64."""

import pytest
import torch

from tests.methods.by_hand import ROWS, Rows, assert_split_changes_nothing, build, one_term


def test_easy_and_hard_tokens_2402_11890() -> None:
    rows = Rows()
    rows.labels[3] = 2  # every row has a label
    z, t = rows.logits.detach().double(), rows.teacher_logits.double()
    p_s, p_t = z.softmax(1), t.softmax(1)
    uncertain = torch.stack([1 - p_t[i, rows.labels[i]] for i in range(ROWS)])
    hard, tkd, dkd = [], [], []
    for i in range(ROWS):
        y = int(rows.labels[i])
        b_t, b_s = (torch.stack([p[i, y], 1 - p[i, y]]) for p in (p_t, p_s))
        tkd.append(float((b_t * (b_t / b_s).log()).sum()))
        others = [c for c in range(p_t.shape[1]) if c != y]
        h_t, h_s = (side[i, others].softmax(0) for side in (t, z))
        dkd.append(float((h_t * (h_t / h_s).log()).sum()))
        hard.append(bool(uncertain[i] >= uncertain.median()))
    easy_mean = sum(d for d, h in zip(dkd, hard, strict=True) if not h) / (ROWS - sum(hard))
    hard_mean = sum(a + d for a, d, h in zip(tkd, dkd, hard, strict=True) if h) / sum(hard)
    expected = 0.2 * easy_mean + 0.8 * hard_mean
    found = float(one_term(build("atkd"), rows, "kd").detach()) / ROWS
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_split_batch_has_the_gradient_of_the_whole() -> None:
    rows = Rows()
    rows.labels[3] = 2
    assert_split_changes_nothing(build("atkd", ce_weight=0.5), rows)
