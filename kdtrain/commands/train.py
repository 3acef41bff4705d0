"""kdtrain train RECIPE."""

import argparse

from kdtrain.recipe import describe_fields, read_recipe, recipe_from_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One recipe; everything behind it overrides fields."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"fields of a recipe, with their defaults:\n{describe_fields()}"
    parser.add_argument("recipe", help="YAML file; any field can follow, as in --training.learning_rate 3e-4")


def main(arguments: argparse.Namespace) -> int:
    """Train, measure, save."""
    content = read_recipe(arguments.recipe, arguments.overrides)
    if content.get("task") == "code_lm":
        from kdtrain.language.recipe import language_recipe_from_dict

        language_recipe = language_recipe_from_dict(content)
        from kdtrain.language.run import run_language

        run_language(language_recipe)
        return 0
    recipe = recipe_from_dict(content)  # a wrong recipe is told before torch is loaded
    from kdtrain.run import run

    run(recipe)
    return 0
