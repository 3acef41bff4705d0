"""What docs/benchmarks.md shows of committed results: the tables, who beats us, and the plots."""

from pathlib import Path

from benchmarks import publish
from benchmarks.plots import plot

STAMP = {"device": "a CPU", "torch": "2.13", "commit": "abc", "date": "2026-01-01"}


def row(contender: str, median: str, peak: str = "", cannot_run: str = "", **case: str) -> publish.Row:
    """A line of a file of results."""
    shape = {
        "case": "linear_kd jsd, N=8, D_s=2, D_t=4, V=30, float32",
        "family": "linear_kd",
        "divergence": "jsd",
    }
    shape |= {
        "tokens": "8",
        "width": "2",
        "vocabulary": "30",
        "teacher": "head",
        "masked": "0.0",
        "mode": "fast",
    }
    figures = {
        "median_s": median,
        "peak_extra_bytes": peak,
        "times_floor": median,
        "times_eager": median,
        "hidden_grad_error": "",
    }
    return {**STAMP, **shape, "contender": contender, **figures, "cannot_run": cannot_run, **case}


ROWS = [
    row("products", "1.0"),
    row("ours", "1.5", str(30 * 2**20), hidden_grad_error="2.4e-6"),
    row("eager", "2.0", str(20 * 2**20)),
    row("liger_jsd", "", cannot_run="its Triton kernels need a GPU"),
]
ENTROPY = {
    "case": "linear_ce none, N=8, D=2, V=30, float32",
    "family": "linear_ce",
    "divergence": "none",
    "teacher": "none",
}


def test_one_table_a_shape() -> None:
    text = publish.tables(
        [*ROWS, row("ours", "0.5", "1", **ENTROPY), row("torch_ce", "0.01", "1", **ENTROPY)]
    )
    lines = text.splitlines()
    assert "| N=8, D_s=2, D_t=4, V=30, float32 | jsd | cross entropy |" in lines
    assert "| kdkernels | 1.50 s, 30 MiB, 1.50 x, 2e-06 | 0.50 s, 0.0 MiB, 0.50 x |" in lines
    assert "| torch linear_cross_entropy (chunked) | - | 10 ms, 0.0 MiB, 0.01 x |" in lines
    assert lines[-1] == (
        "Not in these tables, and why: Liger LigerFusedLinearJSD: its Triton kernels need a GPU."
    )


def test_where_we_lose() -> None:
    name = "linear_kd jsd, N=8, D_s=2, D_t=4, V=30, float32"
    assert publish.losses(ROWS) == [f"{name}: eager PyTorch is leaner (20 MiB against 30 MiB)"]
    faster = publish.losses([ROWS[1], row("trl", "1.2", str(40 * 2**20))])
    assert faster == [
        f"{name}: TRL ChunkedDivergenceFunction is faster (1.20 x the floor against 1.50 x the floor)"
    ]
    assert publish.losses(ROWS[:2]) == []
    assert publish.losses([ROWS[1], row("trl", "1.6", str(30 * 2**20 - 5))]) == []
    given = {"case": "kd forward_kl with labels, N=32, C=20, float32", "family": "kd", "divergence": ""}
    assert publish.short_name(row("ours", "1.0", **given)) == "forward_kl and cross entropy of given logits"


def test_whole_steps() -> None:
    case = {"case": "a step", "family": "language_step"}
    text = publish.step_tables([row("plain", "1.0", str(2**20), tokens_per_second="1024.4", **case)])
    assert "| next tokens only | 1.00 s | 1024 | 1.0 | 1.00 |" in text


def test_the_page_shows_the_committed_results() -> None:
    page = publish.PAGE.read_text(encoding="utf-8")
    assert publish.into(page, publish.published()) == page, "run `python -m benchmarks.publish`"


def test_plots_against_tokens(tmp_path: Path) -> None:
    rows = [
        {
            **STAMP,
            "vocabulary": "300",
            "contender": name,
            "tokens": str(tokens),
            "median_s": str(tokens * factor),
        }
        for name, factor in (("ours", 2.0), ("products", 1.0))
        for tokens in (8, 16)
    ]
    plot(rows, "time", tmp_path / "time.png")
    assert (tmp_path / "time.png").stat().st_size > 5000
