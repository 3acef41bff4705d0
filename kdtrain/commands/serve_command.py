"""kdtrain serve-command RECIPE."""

import argparse
import shlex
from urllib.parse import urlsplit

from kdtrain.errors import KdtrainError
from kdtrain.recipe import LanguageRecipe
from kdtrain.tasks.recipes import load_recipe

WEIGHTS = 0.6
"""Share of the memory of a device that weights may take; the rest is for activations and the key-value cache."""
DTYPES = {"fp32": ("float32", 4), "bf16": ("bfloat16", 2)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One recipe; everything after it overrides fields."""
    parser.add_argument(
        "recipe", help="YAML file of task code_lm; any field can follow, as in --teacher.precision bf16"
    )
    parser.add_argument(
        "--memory", type=float, default=80.0, help="GB of memory of one device of the server (default: 80)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Print the commands that start a server of the recipe's teacher, for hidden states and for log-probabilities."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if not isinstance(recipe, LanguageRecipe):
        raise KdtrainError(
            f"{arguments.recipe} is a recipe of task {recipe.task}; a server runs the teacher of task code_lm"
        )
    if recipe.teacher.path is None:
        raise KdtrainError(
            f"{arguments.recipe} names no teacher; set teacher.path to the folder or hub id that the server loads"
        )
    for heading, words in commands(recipe, arguments.memory):
        print(f"# {heading}\n{shlex.join(words)}")
    return 0


def commands(recipe: LanguageRecipe, memory: float) -> list[tuple[str, list[str]]]:
    """Pairs of a heading and the words of a command.

    Args:
        memory: of one device, in GB.
    """
    import torch

    from kdtrain.models.head_file import empty_model
    from kdtrain.models.loading import parameter_count

    section, length = recipe.teacher, recipe.data.max_length
    assert section.path is not None
    model = empty_model(section.path, "teacher.path", torch.float32)
    dtype, size = DTYPES[section.precision]
    need = parameter_count(model) * size / 1e9
    heads = int(model.config.get_text_config().num_attention_heads)
    devices = 1
    while need / devices > WEIGHTS * memory and heads % (2 * devices) == 0:
        devices *= 2
    address = urlsplit((section.url or "").replace(",", " ").split()[0]) if section.url else None
    common = ["vllm", "serve", section.path, "--dtype", dtype]
    if devices > 1:
        common += ["--tensor-parallel-size", str(devices)]
    if section.served_name is not None:
        common += ["--served-model-name", section.served_name]
    if address is not None and address.hostname:
        common += ["--host", address.hostname, "--port", str(address.port or 8000)]
    pooler = ["--runner", "pooling", "--convert", "embed"]
    pooler += ["--pooler-config", '{"task":"token_embed","use_activation":false}']
    plural = "s" if devices > 1 else ""
    where = f"{need:.1f} GB of weights on {devices} device{plural} of {memory:g} GB"
    return [
        (
            f"hidden states, exact (teacher.signal: hidden, or online with teacher.targets: hidden); {where}",
            [*common, "--max-model-len", str(length), *pooler],
        ),
        (
            f"top {section.top_k} log-probabilities (teacher.signal: topk, or online with teacher.targets: topk); {where}",
            # A prompt needs room for one generated token.
            [*common, "--max-model-len", str(length + 1), "--max-logprobs", str(section.top_k)],
        ),
    ]
