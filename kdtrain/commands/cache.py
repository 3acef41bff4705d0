"""kdtrain cache RECIPE."""

import argparse

from kdtrain.errors import KdtrainError
from kdtrain.progress import say
from kdtrain.recipe import describe_fields, load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One recipe; everything behind it overrides fields."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"fields of a recipe, with their defaults:\n{describe_fields()}"
    parser.add_argument("recipe", help="YAML file; any field can follow, as in --teacher.layers '[2, 4]'")
    parser.add_argument("--verify", action="store_true", help="check all checksums and recompute random rows")
    parser.add_argument(
        "--rows", type=int, default=64, help="how many rows --verify recomputes (default: 64)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Fill the recipe's teacher cache, and check it when asked."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.teacher.path is None:
        raise KdtrainError(f"{arguments.recipe} names no teacher; set teacher.path to a folder or hub id")
    from kdtrain.cache_build import verify_cache
    from kdtrain.data.classification import load_classification
    from kdtrain.prepare import (
        build_method,
        cache_identity,
        cached_rows,
        open_teacher,
        prepare_cache,
        start_accelerator,
    )

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
