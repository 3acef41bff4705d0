"""kdtrain cache RECIPE."""

import argparse
from typing import Any

from kdtrain.console import say
from kdtrain.errors import KdtrainError
from kdtrain.recipe import Recipe, describe_fields, read_recipe, recipe_from_dict, task_of
from kdtrain.tasks.code_lm.recipe import TASK, LanguageRecipe, language_recipe_from_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One recipe; everything behind it overrides fields."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n\n".join(
        f"fields of a recipe of task {task}, with their defaults:\n{describe_fields(kind)}"
        for task, kind in (("classification", Recipe), (TASK, LanguageRecipe))
    )
    parser.add_argument("recipe", help="YAML file; any field can follow, as in --teacher.layers '[2, 4]'")
    parser.add_argument("--verify", action="store_true", help="check all checksums and recompute random rows")
    parser.add_argument(
        "--rows", type=int, default=64, help="how many rows --verify recomputes (default: 64)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Fill the recipe's teacher cache, and check it when asked."""
    content = read_recipe(arguments.recipe, arguments.overrides)
    task = task_of(content)
    if task == TASK:
        return cache_language_model(content, arguments)
    if task == "study":
        raise KdtrainError(
            f"{arguments.recipe} is a study, which stores its teachers' outputs itself; start it with kdtrain study {arguments.recipe}"
        )
    recipe = recipe_from_dict(content)
    if recipe.teacher.path is None:
        raise KdtrainError(f"{arguments.recipe} names no teacher; set teacher.path to a folder or hub id")
    from kdtrain.tasks.classification.prepare import (
        build_method,
        cache_identity,
        cached_rows,
        open_teacher,
        prepare_cache,
        start_accelerator,
    )
    from kdtrain.tasks.classification.splits import load_classification
    from kdtrain.teacher_cache.row_build import verify_cache

    data = load_classification(recipe.data)
    teacher = open_teacher(recipe, data)
    assert teacher is not None
    method = build_method(recipe, teacher)
    device = start_accelerator(recipe).device
    cache = prepare_cache(recipe, data, teacher, method, device)
    say(f"teacher cache: {len(cache)} rows in {cache.folder}")
    if arguments.verify:
        rows, identity = cached_rows(recipe, data, method), cache_identity(recipe, data, teacher, method)
        count = verify_cache(
            cache,
            teacher,
            identity,
            rows,
            count=arguments.rows,
            seed=recipe.seed,
            device=device,
        )
        say(f"teacher cache: all checksums hold and {count} recomputed rows agree")
    return 0


def cache_language_model(content: dict[str, Any], arguments: argparse.Namespace) -> int:
    """The same for a recipe of task code_lm."""
    recipe = language_recipe_from_dict(content)
    if recipe.teacher.path is None or recipe.teacher.signal == "online":
        raise KdtrainError(
            f"{arguments.recipe} stores nothing of a teacher; set teacher.path, and teacher.signal to hidden, topk, "
            "cross_term or shards"
        )
    from kdtrain.tasks.classification.prepare import start_accelerator
    from kdtrain.tasks.code_lm.run import prepare, stored_signals
    from kdtrain.teacher_cache.token_build import verify_language_cache

    device = start_accelerator(recipe).device
    parts = prepare(recipe)
    if parts.shards is not None:
        say(parts.shards.shards.words)
        if arguments.verify:
            parts.shards.shards.verify()
            say("teacher shards: all values are log-probabilities of different tokens")
        return 0
    assert parts.teacher is not None
    for stored in stored_signals(recipe, parts, device):
        say(f"teacher cache: {len(stored.cache)} rows in {stored.cache.folder}")
        if arguments.verify:
            count = verify_language_cache(
                stored.cache,
                parts.teacher,
                stored.rows,
                count=arguments.rows,
                seed=recipe.seed,
                device=device,
            )
            say(f"teacher cache: all checksums hold and {count} recomputed rows agree")
    return 0
