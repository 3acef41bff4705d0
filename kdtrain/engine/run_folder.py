"""A run's folder belongs to one run: the same recipe, the same data, the same teacher."""

import json
from pathlib import Path
from typing import Any

from kdtrain.errors import KdtrainError
from kdtrain.files import write_json
from kdtrain.recipe import differences, read_recipe, recipe_to_dict, save_recipe
from kdtrain.summary import FILE

IDENTITY = "checkpoints/identity.json"
FREE = ("training.accumulation:", "training.checkpointing:")
"""Fields that change memory and not the result: a run that found too little of it goes on with others."""


def claim(folder: Path, recipe: Any, identity: dict[str, str | None]) -> bool:
    """Make `folder` this run's own; whether this very run is finished there.

    Args:
        recipe: of any task, with every default filled in.
        identity: hashes of what the recipe only names, such as the content of the data and the teacher's weights.

    Raises:
        KdtrainError: the folder holds another run; the sentence names the first fields that differ.
    """
    if (folder / "recipe.yaml").exists():
        old, new = read_recipe(folder / "recipe.yaml"), recipe_to_dict(recipe)
        found = differences({**old, "output": None}, {**new, "output": None})
        found = [difference for difference in found if not difference.startswith(FREE)]
        known = json.loads((folder / IDENTITY).read_text()) if (folder / IDENTITY).exists() else identity
        found += [
            f"the content of the {part} has changed" for part in identity if known.get(part) != identity[part]
        ]
        if found:
            raise KdtrainError(
                f"{folder} holds another run ({'; '.join(found[:3])}); choose another output or delete that folder"
            )
        if (folder / FILE).exists():
            return True
    write_json(folder / IDENTITY, identity)
    save_recipe(recipe, folder / "recipe.yaml")
    return False
