"""The checks of options that only the logit losses have."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.checks import check_integers, check_number
from ..divergences import Divergence
from ..options import LogitTransform
from ..teachers import TeacherCrossTerm, TeacherHead, TeacherTopK


def check_label_smoothing(label_smoothing: object) -> None:
    """A number in [0, 1)."""
    check_number("label_smoothing", label_smoothing)
    assert isinstance(label_smoothing, int | float)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")


def check_transform(prefix: str, scale_name: str, scale: object, softcap: object) -> LogitTransform:
    """A finite scale other than 0 and a softcap above 0 or None."""
    check_number(f"{prefix}{scale_name}", scale)
    assert isinstance(scale, int | float)
    if scale == 0:
        raise ValueError(f"{prefix}{scale_name} must not be 0, which makes all logits equal; 1.0 leaves them")
    if softcap is None:
        return LogitTransform(float(scale))
    check_number(f"{prefix}softcap", softcap)
    assert isinstance(softcap, int | float)
    if softcap <= 0:
        raise ValueError(f"{prefix}softcap must be above 0, got {softcap}; None leaves the logits uncapped")
    return LogitTransform(float(scale), float(softcap))


def check_vocab_map_kind(vocab_map: object) -> None:
    """None, "shared_prefix" or a tensor of ids: what can be said without the vocabularies."""
    if vocab_map is None or (isinstance(vocab_map, str) and vocab_map == "shared_prefix"):
        return
    if not isinstance(vocab_map, Tensor):
        raise ValueError(f"vocab_map must be None, 'shared_prefix' or an index tensor, got {vocab_map!r}")
    check_integers("vocab_map", vocab_map, "teacher ids")


def check_low_memory(teacher: object, vocab_map: object, return_stats: bool) -> None:
    """What tiles of the vocabulary are not made for."""
    unsupported = (
        (isinstance(teacher, TeacherTopK | TeacherCrossTerm), type(teacher).__name__),
        (isinstance(vocab_map, Tensor), "an index tensor as vocab_map"),
        (return_stats, "return_stats=True"),
    )
    for present, name in unsupported:
        if present:
            raise NotImplementedError(
                f"{name} is not supported yet with mode='low_memory'; use mode='fast', with a small chunk_bytes"
            )


def check_tiles(divergence: Divergence, mode: str, sharded: bool) -> None:
    """Tiles and shards of the vocabulary need a divergence whose sums over them can be added up."""
    if (mode == "low_memory" or sharded) and not divergence.properties.adds_over_tiles:
        given = "vocab_group" if sharded else "mode='low_memory'"
        raise NotImplementedError(
            f"{divergence!r} is not supported with {given}: its value is no sum over tiles of the vocabulary; "
            "use mode='fast' without a vocab_group"
        )


def check_vocab_group(
    group: object,
    *,
    impl: object,
    mode: object,
    vocab_map: object,
    return_stats: bool,
    check_finite: bool,
) -> None:
    """What a sharded vocabulary does not go with."""
    if group is None:
        return
    others = {
        "impl='reference'": (
            impl == "reference",
            "the reference takes the whole vocabulary; use impl='torch'",
        ),
        "mode='low_memory'": (
            mode == "low_memory",
            "tiles are for one process; a shard is small, use mode='fast'",
        ),
        "vocab_map": (
            vocab_map is not None,
            "a map relates whole vocabularies; slice both heads to the shared ids",
        ),
        "return_stats=True": (return_stats, "no rank has whole rows; leave it at False"),
        "check_finite=True": (check_finite, "no rank has whole rows; leave it at False"),
    }
    for name, (given, reason) in others.items():
        if given:
            raise NotImplementedError(f"{name} is not supported with vocab_group: {reason}")


def check_logit_dtype(
    logit_dtype: torch.dtype,
    head_dtype: torch.dtype,
    teacher: object,
    autocast: torch.dtype | None,
    impl: str,
    mode: str,
    vocab_group: object,
) -> None:
    """Rounded logits come out of GEMMs of that dtype, and in the fast mode."""
    if impl == "reference":
        raise ValueError("impl='reference' has float32 logits; leave logit_dtype at None there")
    if mode != "fast" or vocab_group is not None:
        other = "vocab_group" if vocab_group is not None else f"mode={mode!r}"
        raise NotImplementedError(f"logit_dtype is not supported yet with {other}; leave it at None")
    dtypes = [("student_weight", head_dtype)]
    if isinstance(teacher, TeacherHead):
        dtypes.append(("teacher weight", autocast or teacher.weight.dtype))
    for name, dtype in dtypes:
        if dtype != logit_dtype:
            raise ValueError(
                f"logit_dtype={logit_dtype} rounds the logits of {logit_dtype} heads, but {name} is {dtype}; "
                "leave it at None, or cast the heads or call the loss inside torch.autocast"
            )
