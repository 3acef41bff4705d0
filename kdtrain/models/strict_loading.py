"""Models whose every weight comes from their file: missing, extra, renamed, misshapen and non-finite weights are refused by name.

transformers fills what a file lacks with random numbers and logs a warning. A teacher or student of that kind trains and
evaluates without any further sign, so nothing here is loaded in another way.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdtrain.console import say
from kdtrain.errors import KdtrainError

NAMED = 3
"""How many tensors a sentence names."""
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", ".model", ".tiktoken", "tekken")
"""A part of the name of every file from which a tokenizer is read."""
SAMPLE = "def add(first, second):\n    return first + second\n"
"""Code that every tokenizer of a code model splits into tokens of its vocabulary."""


def load_strictly(
    kind: Any, path: str, field: str, *, new_head: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a model of transformers by folder or hub id and refuse weights that do not match its configuration.

    Args:
        kind: a class with `from_pretrained`, such as AutoModelForCausalLM.
        path: folder or hub id.
        field: the recipe field that names it.
        new_head: whether everything outside of the body (and a pooler) may be missing, of another shape, or of another task.
        options: for `from_pretrained`.

    Raises:
        KdtrainError: names the tensors that are missing, unused, of another shape, or not finite.
    """
    model, info = kind.from_pretrained(
        path,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with their names
        **options,
    )
    shapes = {name: (tuple(there), tuple(here)) for name, there, here in info["mismatched_keys"]}
    check_names(model, path, field, info["missing_keys"], info["unexpected_keys"], shapes, new_head=new_head)
    if info.get("error_msgs"):
        raise KdtrainError(f"{field}: {path} could not be loaded: {info['error_msgs'][0]}")
    check_finite_weights(model, path, field)
    return model


def check_names(
    model: PreTrainedModel,
    path: str,
    field: str,
    missing: Iterable[str],
    unused: Iterable[str],
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    new_head: bool,
) -> None:
    """Refuse a file whose tensors are not those of the model.

    Args:
        missing: names of the model that the file lacks.
        unused: names of the file that the model lacks.
        shapes: shape in the file and in the model, of each name where they differ.
    """
    missing, unused = set(missing), {name for name in unused if not _in_pooler(name)}
    if new_head:
        new = _whole_new_parts(model, missing)
        missing -= new
        if new and not missing:
            say(f"{field}: {path} has no {_listed(new)}; the new head starts with random weights")
        if not missing:  # otherwise they may be the missing ones under another name
            unused = {name for name in unused if _in_body(model, name)}
        shapes = {name: pair for name, pair in shapes.items() if _in_body(model, name)}
    found = []
    if missing:
        found.append(f"it lacks {_listed(missing)}")
    if unused:
        found.append(f"it holds {_listed(unused)}, for which the model has no place")
    if shapes:
        words = (f"{name} {list(there)} for {list(here)}" for name, (there, here) in shapes.items())
        found.append(f"other shapes than its configuration gives: {_listed(words)}")
    if found:
        raise KdtrainError(
            f"{field}: the weights in {path} are not those of the {type(model).__name__} that its config.json describes: "
            f"{'; '.join(found)}. Copy or save the model again, or name another one"
        )


def check_finite_weights(model: nn.Module, path: str, field: str) -> None:
    """Refuse weights that are NaN or infinite."""
    bad = []
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            low, high = torch.aminmax(tensor.detach())
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                bad.append(name)
    if bad:
        raise KdtrainError(
            f"{field}: {path} holds NaN or infinite weights in {_listed(bad)}; copy or save the model again, or name another one"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str, field: str) -> None:
    """Refuse a tokenizer without a vocabulary, which transformers makes up where files are missing."""
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    if not set(ids) - special:
        raise KdtrainError(
            f"{field}: the tokenizer in {path} turns code into unknown tokens only (it has {len(tokenizer)} tokens, a {type(tokenizer).__name__}); "
            "save the model's tokenizer into it with save_pretrained"
        )


def check_tokenizer_files(path: str, field: str) -> None:
    """Refuse a folder without any file of a tokenizer."""
    folder = Path(path)
    if folder.is_dir() and not any(word in one.name for one in folder.iterdir() for word in TOKENIZER_FILES):
        raise KdtrainError(
            f"{field}: {path} has no tokenizer files (it has {_listed(one.name for one in folder.iterdir()) or 'nothing'}); save the "
            "model's tokenizer into it with save_pretrained"
        )


def _whole_new_parts(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """The missing names of those parts of the head of which the file has nothing."""
    own = model.state_dict(keep_vars=True)
    absent = {id(own[name]) for name in missing if name in own}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    partly = {
        _part(model, name)
        for name, tensor in own.items()
        if name not in missing and id(tensor) not in absent and name not in tied
    }
    return {name for name in missing if not _in_body(model, name) and _part(model, name) not in partly}


def _part(model: PreTrainedModel, name: str) -> str:
    """The module of the head that holds a tensor, or the tensor itself where it is no part of any."""
    first, dot, rest = name.partition(".")
    if _in_pooler(name):
        return "pooler"
    return first if dot and rest else name


def _in_body(model: PreTrainedModel, name: str) -> bool:
    if _in_pooler(name):
        return False
    prefix = f"{model.base_model_prefix}."
    if name.startswith(prefix):
        return True
    body = model.base_model
    children = {child for child, _ in body.named_children()} | {
        own for own, _ in body.named_parameters(recurse=False)
    }
    # A head may be called like a part of the body: what is a module of the whole model is meant there.
    if body is not model and name.partition(".")[0] in dict(model.named_children()):
        return False
    return name.partition(".")[0] in children


def _in_pooler(name: str) -> bool:
    """A pooler belongs to the head: files of many encoders bring one along that classifiers do not read."""
    return "pooler" in name.split(".")


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
