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
    from kdtrain.engine.accelerator import start_accelerator
    from kdtrain.tasks.classification.task import Classification
    from kdtrain.teacher_cache.row_build import verify_cache

    run = Classification(recipe)
    device = start_accelerator(recipe.training).device
    cache = run.build_cache(device)
    say(f"teacher cache: {len(cache)} rows in {cache.folder}")
    if arguments.verify:
        assert run.teacher is not None
        count = verify_cache(
            cache,
            run.teacher,
            run.cache_identity(),
            run.cached_rows,
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
    from kdtrain.engine.accelerator import start_accelerator
    from kdtrain.tasks.code_lm.task import CodeLM
    from kdtrain.teacher_cache.token_build import verify_language_cache

    run = CodeLM(recipe)
    device = start_accelerator(recipe.training).device
    run.identity()
    if run.shards is not None:
        say(run.shards.shards.words)
        if arguments.verify:
            run.shards.shards.verify()
            say("teacher shards: all values are log-probabilities of different tokens")
        return 0
    if run.stored is None:
        raise KdtrainError(
            f"{arguments.recipe} learns nothing from the teacher, so nothing is stored; set method.name to kd"
        )
    assert run.teacher is not None
    for stored in run.stored_signals(device):
        say(f"teacher cache: {len(stored.cache)} rows in {stored.cache.folder}")
        if arguments.verify:
            count = verify_language_cache(
                stored.cache,
                run.teacher,
                stored.rows,
                count=arguments.rows,
                seed=recipe.seed,
                device=device,
            )
            say(f"teacher cache: all checksums hold and {count} recomputed rows agree")
    return 0
