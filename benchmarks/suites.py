"""Which cases are measured together, by name."""

from typing import Any

from benchmarks import contextual, features, given_logits, language_steps, study_steps
from benchmarks.cases import Case
from benchmarks.operation import AnyCase


def _gpu(divergence: str = "forward_kl", **shape: Any) -> Case:
    """A case at the shape of Llama-3.2-1B under 8B, 8192 tokens, unless told otherwise."""
    reference = {"tokens": 8192, "width": 2048, "teacher_width": 4096, "vocabulary": 128256}
    return Case(divergence, **{**reference, "dtype": "bfloat16", "device": "cuda", **shape})


def _entropy(case: Case) -> Case:
    """The same shape without a teacher."""
    return Case(**{**case.as_dict(), "operation": "linear_ce", "divergence": "none", "teacher": "none"})


SUITES: dict[str, tuple[AnyCase, ...]] = {
    # The shape of the README's main table.
    "cpu": (
        Case("forward_kl"),
        Case("reverse_kl"),
        Case("jsd"),
        Case("forward_kl", masked=0.5),
        _entropy(Case("forward_kl")),
        given_logits.Case(32, 20),
        given_logits.Case(1024, 32000),
    ),
    # The other divergences, and every form of a teacher.
    "family": (
        *(Case(name) for name in ("skew_kl", "skew_reverse_kl", "tvd", "alpha_beta", "decoupled")),
        *(
            Case("forward_kl", teacher=teacher)
            for teacher in ("logits", "top_k", "top_k_bucket", "cross_term")
        ),
        Case("forward_kl", mode="low_memory"),
    ),
    # How time and memory grow with the tokens.
    "sweep": tuple(Case("forward_kl", tokens=tokens) for tokens in (512, 1024, 2048, 4096)),
    # Tiny cases of everything: does it run and agree?
    "smoke": (
        Case("forward_kl", tokens=256, width=64, teacher_width=96, vocabulary=4000, masked=0.25),
        Case("jsd", tokens=256, width=64, teacher_width=96, vocabulary=4000),
        _entropy(Case("forward_kl", tokens=256, width=64, vocabulary=4000)),
        given_logits.Case(32, 20),
        *features.SMOKE,
        *contextual.SMOKE,
        *language_steps.SMOKE,
        *study_steps.SMOKE,
    ),
    "features": features.CPU,
    "contextual": contextual.CPU,
    "steps": (*language_steps.CPU, *study_steps.CPU),
    # These need a GPU. What matters most comes first: a run that is cut keeps the cases it finished.
    "gpu": (
        _gpu(),
        _gpu("jsd"),
        _gpu("reverse_kl"),
        _gpu(masked=0.5),
        _entropy(_gpu()),
        *(_gpu(tokens=tokens) for tokens in (1024, 2048, 4096, 16384, 32768)),
        _gpu(width=896, teacher_width=3584, vocabulary=151936),  # Qwen2.5-Coder 0.5B under 7B
        _gpu(width=1536, teacher_width=3584, vocabulary=151936),  # Qwen2.5-Coder 1.5B under 7B
        _gpu(width=2304, teacher_width=3584, vocabulary=256000),  # Gemma-2 2B under 9B
        _gpu(width=3072, teacher_width=6144, vocabulary=49152),  # StarCoder2 3B under 15B
        _gpu(width=2048, teacher_width=4096, vocabulary=32256),  # DeepSeek-Coder 1.3B under 6.7B
        _gpu(width=768, teacher_width=768, vocabulary=50265),  # CodeBERT's masked language model
        _gpu(width=768, teacher_width=768, vocabulary=51416),  # UniXcoder's
        _gpu(teacher="logits"),
        given_logits.Case(32, 20, device="cuda"),
    ),
    # Parts of `benchmarks.gpu`: what a first short run on a GPU is for.
    "gpu_reference": (_gpu(), _gpu("jsd")),
    "gpu_chunks": tuple(_gpu(chunk_rows=rows) for rows in (1024, 2048, 4096)),
    "gpu_kd": (
        given_logits.Case(8192, 128256, "bfloat16", device="cuda"),
        given_logits.Case(8192, 32000, device="cuda"),
        given_logits.Case(32, 20, device="cuda"),
    ),
    "gpu_features": (*features.GPU, *contextual.GPU),
    "gpu_steps": (*language_steps.GPU, *study_steps.GPU),
    "gpu_smoke": (
        _gpu(tokens=1024, width=256, teacher_width=512, vocabulary=32000),
        _entropy(_gpu(tokens=1024, width=256, vocabulary=32000)),
    ),
}
