"""kdtrain cache RECIPE."""

import argparse
import json
from contextlib import closing
from typing import TYPE_CHECKING

from kdtrain.console import add_output_options, say
from kdtrain.errors import KdtrainError
from kdtrain.recipe import ClassificationRecipe, LanguageRecipe, read_yaml
from kdtrain.tasks.recipes import recipe_from_dict, task_named_in

if TYPE_CHECKING:
    from kdtrain.tasks.code_lm.task import CodeLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One recipe; any field can be overridden."""
    parser.add_argument("recipe", help="YAML file; any field can be set, as in --teacher.layers '[2, 4]'")
    parser.add_argument("--verify", action="store_true", help="check all checksums and recompute random rows")
    parser.add_argument(
        "--rows", type=int, default=64, help="how many rows --verify recomputes (default: 64)"
    )
    add_output_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Fill the recipe's teacher cache, and check it when asked."""
    content = read_yaml(arguments.recipe, arguments.overrides)
    if task_named_in(content) == "study":
        raise KdtrainError(
            f"{arguments.recipe} is a study, which stores its teachers' outputs itself; start it with kdtrain study {arguments.recipe}"
        )
    recipe = recipe_from_dict(content)
    if isinstance(recipe, LanguageRecipe):
        return cache_language_model(recipe, arguments)
    if not isinstance(recipe, ClassificationRecipe):
        raise KdtrainError(f"{arguments.recipe} is a recipe of task {recipe.task}, which has no teacher")
    if recipe.teacher.path is None:
        raise KdtrainError(f"{arguments.recipe} names no teacher; set teacher.path to a folder or hub id")
    from kdtrain.engine.accelerator import start_accelerator
    from kdtrain.tasks.classification.task import Classification
    from kdtrain.teacher_cache.shard import keys_of
    from kdtrain.teacher_cache.verify import verify

    run = Classification(recipe)
    accelerator = start_accelerator(recipe.training)
    store = run.filled_store(accelerator)
    if accelerator.is_main_process:
        say(f"teacher cache: {len(store)} rows in {store.folder}")
        if arguments.json:
            print(json.dumps({"folder": str(store.folder), "rows": len(store)}))
    if arguments.verify:
        rows = run.cached_rows
        prepare, keys = run.prepare_work(rows, accelerator.device), keys_of(rows.keys())
        count = verify(store, keys, prepare, accelerator, count=arguments.rows, seed=recipe.seed)
        if accelerator.is_main_process:
            say(f"teacher cache: all checksums hold and {count} recomputed rows agree")
    return 0


def cache_language_model(recipe: LanguageRecipe, arguments: argparse.Namespace) -> int:
    """The same for a recipe of task code_lm."""
    if recipe.teacher.path is None or recipe.teacher.signal == "online":
        raise KdtrainError(
            f"{arguments.recipe} stores nothing of a teacher; set teacher.path, and teacher.signal to hidden, topk, "
            "cross_term or shards"
        )
    from kdtrain.tasks.code_lm.task import CodeLM

    with closing(CodeLM(recipe)) as run:
        return fill_and_verify(run, arguments)


def fill_and_verify(run: "CodeLM", arguments: argparse.Namespace) -> int:
    """Fill the store of an opened run of task code_lm."""
    from kdtrain.engine.accelerator import start_accelerator
    from kdtrain.tasks.code_lm.teacher_outputs import TeacherRows
    from kdtrain.teacher_cache.verify import verify

    recipe = run.recipe
    accelerator = start_accelerator(recipe.training)
    main = accelerator.is_main_process
    run.identity()
    if run.external is not None:
        if main:
            say(run.external.words)
        if main and arguments.verify:
            run.external.verify()
            say("teacher shards: all values are log-probabilities of different tokens")
        return 0
    if run.stored is None:
        raise KdtrainError(
            f"{arguments.recipe} learns nothing from the teacher, so nothing is stored; set method.name to kd"
        )
    for rows in run.stored_signals(accelerator):
        if not isinstance(rows, TeacherRows):  # held-out rows of a teacher that answers no hidden states
            continue
        assert rows.store is not None
        if main:
            say(f"teacher cache: {len(rows.store)} segments in {rows.store.folder}")
        if main and arguments.json:
            print(json.dumps({"folder": str(rows.store.folder), "rows": len(rows.store)}))
        if arguments.verify:
            assert rows.prepare is not None
            count = verify(
                rows.store, rows.keys, rows.prepare, accelerator, count=arguments.rows, seed=recipe.seed
            )
            if main:
                say(f"teacher cache: all checksums hold and {count} recomputed rows agree")
    return 0
