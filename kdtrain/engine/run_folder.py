"""A run's folder belongs to one run: the same recipe, data, teacher, start weights and tokenizer, and one process that writes."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from kdtrain.checksums import FILE as CHECKSUMS
from kdtrain.checksums import check_sealed, sealed_names
from kdtrain.engine.checkpoint import steps_of
from kdtrain.errors import KdtrainError
from kdtrain.files import write_json, writing
from kdtrain.recipe import RunRecipe, differences, read_yaml, save_recipe, with_defaults
from kdtrain.summary import FILE, OUTPUTS

RECIPE = "recipe.yaml"
IDENTITY = "checkpoints/identity.json"
FREE = (
    "training.gradient_accumulation_steps:",
    "training.gradient_checkpointing:",
    "training.ddp_timeout:",
    "training.report_to:",
    "training.save_steps:",
    "training.save_total_limit:",
    "teacher.url:",
)
"""Fields that change memory, or the machine that answers, and not the result: an unfinished run goes on with others."""

LENGTH = ("training.max_steps:", "training.num_train_epochs:")
"""Fields that may grow: the run then resumes from its last checkpoint and goes further."""


@contextmanager
def claimed(
    folder: Path, recipe: RunRecipe, identity: dict[str, str | None], accelerator: Accelerator
) -> Iterator[bool]:
    """Hold `folder` alone while the block runs and make it this run's own; whether this very run is finished there.

    All processes of the run take part; the first one holds the lock, before it looks at anything.

    Args:
        recipe: of any task, with every default filled in.
        identity: hashes of what the recipe only names, such as the content of the data and the teacher's weights.

    Raises:
        KdtrainError: another process writes there; the folder holds another run (the sentence names the first fields that
            differ), or files that no run wrote; a finished run of which a file is damaged.
    """
    with ExitStack() as stack:
        finished = [False]
        if accelerator.is_main_process:
            stack.enter_context(writing(folder, "the run", "output"))
            finished = [claim(folder, recipe, identity)]
        if accelerator.num_processes > 1:
            broadcast_object_list(finished)
        yield finished[0]


def claim(folder: Path, recipe: RunRecipe, identity: dict[str, str | None]) -> bool:
    """Make `folder` this run's own, see `claimed`; the caller holds the lock."""
    if not (folder / RECIPE).exists():
        refuse_foreign_files(folder)
        write_json(folder / IDENTITY, identity)
        save_recipe(recipe, folder / RECIPE)
        return False
    old, new = with_defaults(read_yaml(folder / RECIPE), recipe), recipe.plain()
    found = differences({**old, "output": None}, {**new, "output": None})
    found = [difference for difference in found if not difference.startswith(FREE)]
    known = read_identity(folder)
    found += [
        f"the content of the {part} has changed" for part in identity if known.get(part) != identity[part]
    ]
    longer = all(difference.startswith(LENGTH) for difference in found) and is_longer(old, new)
    if found and not longer and not has_begun(folder):
        # A run that was refused or that failed before its first checkpoint has nothing to lose.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        write_json(folder / IDENTITY, identity)
        save_recipe(recipe, folder / RECIPE)
        return False
    if found and not longer:
        raise KdtrainError(
            f"{folder} contains another run ({'; '.join(found[:3])}); set output to a new folder or delete that one"
        )
    ended = has_ended(folder)
    if ended and not found:
        return True
    if ended:  # the longer run makes its own
        (folder / CHECKSUMS).unlink()
    save_recipe(recipe, folder / RECIPE)
    return False


def is_longer(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a recipe asks for no fewer steps than another one that is equal but for its length."""
    (before, epochs), (after, more) = (
        (one["training"]["max_steps"], one["training"]["num_train_epochs"]) for one in (old, new)
    )
    if before is None and after is None:
        return bool(more >= epochs)
    return before is not None and after is not None and after >= before


def has_begun(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, or anything else that a run leaves and that is read again."""
    checkpoints = folder / "checkpoints"
    steps = [*steps_of(checkpoints), *steps_of(checkpoints, "best")]
    return bool(steps) or any((folder / name).exists() for name in OUTPUTS)


def has_ended(folder: Path) -> bool:
    """Whether a run has ended here, with all that it leaves.

    Raises:
        KdtrainError: it has, but one of its files is missing or damaged now.
    """
    remedy = (
        f"delete {folder / 'checksums.json'}, and the same command makes the run's files again (from the last checkpoint, where "
        "there is one)"
    )
    if FILE not in sealed_names(folder, remedy):
        return False  # a run that ended between summary.json and the checksums writes both again
    check_sealed(folder, remedy)
    return True


def read_identity(folder: Path) -> dict[str, str | None]:
    """What the run of a folder was made of.

    Raises:
        KdtrainError: nothing says so.
    """
    try:
        found = json.loads((folder / IDENTITY).read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise KdtrainError(
            f"{folder / IDENTITY} cannot be read ({error}), so nothing says which data and models that run is of; choose another "
            "output or delete that folder"
        ) from None
    return found


def refuse_foreign_files(folder: Path) -> None:
    """Refuse a folder that no recipe.yaml claims, yet that holds what this run would replace or take for its own."""
    steps = [*steps_of(folder / "checkpoints"), *steps_of(folder / "checkpoints", "best")]
    taken = [name for name in OUTPUTS if (folder / name).exists()] + ["checkpoints"] * bool(steps)
    if taken:
        raise KdtrainError(
            f"{folder} holds {', '.join(taken)}, but no {RECIPE} that names the run they are of; choose another output, or move "
            "these files away"
        )


def recipe_hash(recipe: RunRecipe) -> str:
    """Of all fields of a recipe that decide the result: SHA-256, the first 32 hexadecimal digits."""

    def fields(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in sorted(content.items()):
            if isinstance(value, dict):
                yield from fields(value, f"{prefix}{name}.")
            elif not f"{prefix}{name}:".startswith((*FREE, *LENGTH, "output:")):
                yield f"{prefix}{name}: {value!r}"

    return hashlib.sha256("\n".join(fields(recipe.plain())).encode()).hexdigest()[:32]
