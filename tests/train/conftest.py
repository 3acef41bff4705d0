"""A toy task that a tiny model learns in seconds: which error can this one-line function raise?"""

import json
import random
from pathlib import Path

import pytest

from kdtrain.methods import method_options
from kdtrain.recipe import (
    ClassificationRecipe,
    ClassificationTraining,
    DataSection,
    StudentSection,
    TeacherSection,
)
from kdtrain.run import run

CLASSES = ("KeyError", "ValueError", "OSError")
CALLS = ("{d}[{k}]", "int({k}, 8) + 1", "open({k}).read()")
FOCUS = "__HOLE__"


def toy_row(generator: random.Random, label: int) -> str:
    """A function of 1 to 9 lines whose `except` type is hidden."""
    name, key = ("".join(generator.choices(letters, k=3)) for letters in ("abcdefgh", "uvwxyz"))
    body = "".join(f"    {v} = {key} + 1\n" for v in generator.choices("pqrst", k=generator.randrange(8)))
    call = CALLS[label].format(d="d", k=key)
    return (
        f"def {name}({key}, d):\n{body}    try:\n        return {call}\n    except {FOCUS}:\n        pass\n"
    )


def write_rows(path: Path, count: int, seed: int, *, labelled: bool = True) -> None:
    """Write `count` rows as JSONL."""
    generator = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            label = generator.randrange(3)
            row = {"code": toy_row(generator, label), **({"label": label} if labelled else {})}
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set folder: 240 training rows, 32 for validation, 40 for the test, 24 without labels."""
    folder = tmp_path_factory.mktemp("toy")
    write_rows(folder / "train.jsonl", 240, 1)
    write_rows(folder / "valid.jsonl", 32, 2)
    write_rows(folder / "test.jsonl", 40, 3)
    write_rows(folder / "unlabelled.jsonl", 24, 4, labelled=False)
    about = {"task": "classification", "text": "code", "label": "label", "classes": CLASSES, "focus": FOCUS}
    (folder / "dataset.json").write_text(json.dumps({**about, "name": "toy"}))
    return folder


@pytest.fixture(scope="session")
def recipe(toy: Path) -> ClassificationRecipe:
    """A fine-tuning run of about a second; tests replace its parts."""
    return ClassificationRecipe(
        data=DataSection(path=str(toy)),
        student=StudentSection(
            vocab_size=320, hidden_size=32, layers=2, heads=2, intermediate_size=64, max_length=48
        ),
        method=(method_options("ft"),),
        training=ClassificationTraining(
            num_train_epochs=2, batch_size=16, learning_rate=3e-3, logging_steps=2
        ),
    )


@pytest.fixture(scope="session")
def teacher(recipe: ClassificationRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher folder: 3 layers, its own tokenizer, trained on the toy task until it knows it."""
    folder = tmp_path_factory.mktemp("teacher")
    student = recipe.student.replaced(vocab_size=380, layers=3, hidden_size=48, max_length=64, dropout=0.0)
    training = recipe.training.replaced(num_train_epochs=14)
    run(recipe.replaced(student=student, training=training, output=str(folder)))
    return folder / "student"


@pytest.fixture(scope="session")
def distillation(
    recipe: ClassificationRecipe, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> ClassificationRecipe:
    """Distillation with features from that teacher, its outputs shared by all tests."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return recipe.replaced(
        teacher=TeacherSection(path=str(teacher), cache=cache, layers=(1, 2, 3), dtype="float32"),
        method=method_options("kd_features"),
    )
