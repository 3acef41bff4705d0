"""Sections of a recipe: what is refused, by its sentence, and what comes back unchanged."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from kdtrain.errors import KdtrainError
from kdtrain.recipe.base import (
    FINITE,
    POSITIVE,
    MethodOptions,
    Number,
    Section,
    Text,
    Whole,
    nearest,
    parse_method,
)
from kdtrain.recipe.load import differences, read_yaml, save_recipe
from kdtrain.recipe.schema import describe, json_schema
from kdtrain.recipe.training import TrainingSection


class Sharpened(MethodOptions):
    """Soft labels."""

    name: Literal["sharpened"] = Field(default="sharpened", description="the method")
    temperature: Annotated[Number, POSITIVE, FINITE] = Field(default=2.0, description="T of both sides")
    layer_map: tuple[tuple[Whole, Whole], ...] = Field(default=(), description="pairs of layers")


class Whole_(Section):
    """One run."""

    training: TrainingSection = Field(default=TrainingSection(), description="how long")
    output: Text = Field(description="folder of the run")


METHODS = {"sharpened": Sharpened}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"output": "x", "traning": {}}, "unknown recipe key traning; did you mean training?"),
        ({"output": "x", "training": {"lr": 1}}, "training.lr; did you mean training.learning_rate?"),
        ({"output": "x", "training": {"wd": 1}}, "training.wd; did you mean training.weight_decay?"),
        ({"output": "x", "training": {"bs": 1}}, "training.bs; did you mean training.batch_size?"),
        (
            {"output": "x", "training": {"grad_accum": 2}},
            "training.grad_accum; did you mean training.gradient_accumulation_steps?",
        ),
        (
            {"output": "x", "training": {"zzqq": 2}},
            "unknown recipe key training.zzqq (valid here: num_train_epochs,",
        ),
        ({"training": {}}, "output is missing: folder of the run"),
        (
            {"output": False},
            "output must be text, got False; YAML reads no, off, yes and on so: put the word into quotes",
        ),
        (
            {"output": "x", "training": {"max_steps": "many"}},
            "training.max_steps must be a whole number, got 'many'",
        ),
        (
            {"output": "x", "training": {"max_steps": 1.5}},
            "training.max_steps must be a whole number, got 1.5",
        ),
        (
            {"output": "x", "training": {"max_steps": True}},
            "training.max_steps must be a whole number, got True",
        ),
        (
            {"output": "x", "training": {"learning_rate": -1}},
            "training.learning_rate must be greater than 0, got -1",
        ),
        (
            {"output": "x", "training": {"learning_rate": float("nan")}},
            "training.learning_rate must be greater than 0, got nan",
        ),
        (
            {"output": "x", "training": {"learning_rate": "much"}},
            "training.learning_rate must be a number, got 'much'",
        ),
        (
            {"output": "x", "training": {"group_by_length": "yes"}},
            "training.group_by_length must be true or false, got 'yes'",
        ),
        ({"output": "x", "training": {"warmup_ratio": 1}}, "training.warmup_ratio must be below 1, got 1"),
        (
            {"output": "x", "training": {"precision": "fp8"}},
            "training.precision must be one of fp32, bf16, fp16, got 'fp8'",
        ),
        (
            {"output": "x", "training": {"batch_size": 4, "gradient_accumulation_steps": 8}},
            "cannot be larger, got 8 and 4",
        ),
        ({"output": "x", "training": 3}, "training must be a section with fields, got 3"),
        (3, "must be a section with fields, got 3"),
    ],
)
def test_wrong_fields_are_one_sentence(content: object, sentence: str) -> None:
    with pytest.raises(KdtrainError) as caught:
        Whole_.parse(content)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(KdtrainError) as caught:
        Whole_.parse({"output": "x", "training": {"learning_rate": 0, "lr": 1, "max_steps": "a"}})
    first, *others = str(caught.value).split("\n")
    assert first == "3 fields of the recipe are wrong:"
    assert len(others) == 3 and all("training." in line for line in others)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            {"name": "sharpend"},
            "method.name must be one of sharpened, got 'sharpend'; did you mean sharpened?",
        ),
        ({}, "method.name must be one of sharpened, got None"),
        ({"name": ["a"]}, "method.name must be one of sharpened, got ['a']"),
        ([], "method must be a section with fields, got []"),
        (
            {"name": "sharpened", "window": 3},
            "unknown recipe key method.window (valid here: name, temperature, layer_map)",
        ),
        ({"name": "sharpened", "tau": 3}, "unknown recipe key method.tau; did you mean method.temperature?"),
        ({"name": "sharpened", "temperature": 0}, "method.temperature must be greater than 0, got 0"),
        ({"name": "sharpened", "temperature": float("inf")}, "method.temperature must be finite, got inf"),
        ({"name": "sharpened", "layer_map": [[1]]}, "method.layer_map[0][1] is missing"),
    ],
)
def test_a_method_refuses_what_it_does_not_read(content: object, sentence: str) -> None:
    with pytest.raises(KdtrainError) as caught:
        parse_method(content, METHODS)
    assert sentence in str(caught.value)


def test_numbers_as_people_write_them() -> None:
    # YAML 1.1 reads 3e-4 as text.
    options = parse_method({"name": "sharpened", "temperature": "3e-1", "layer_map": [[1, 2]]}, METHODS)
    assert isinstance(options, Sharpened)
    assert (options.temperature, options.layer_map) == (0.3, ((1, 2),))


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    recipe = Whole_.parse({"output": "x", "training": {"max_grad_norm": float("inf"), "learning_rate": 1e-5}})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert Whole_.parse(read_yaml(tmp_path / "recipe.yaml")) == recipe


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_overrides_reach_any_field(tmp_path: Path) -> None:
    path = write(tmp_path, "output: x\ntraining:\nmethod: [{name: kd}]\n")
    words = [
        "--training.learning_rate",
        "3e-4",
        "--output=there",
        "--method.0.temperature",
        "4",
        "--seed",
        "-1",
    ]
    assert read_yaml(path, words) == {
        "output": "there",
        "training": {"learning_rate": "3e-4"},
        "method": [{"name": "kd", "temperature": 4}],
        "seed": -1,
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--training.learning_rate"], "--training.learning_rate needs a value"),
        (["--quiet", "--seed", "1"], "--quiet needs a value"),
        (["training.learning_rate=1"], "expected an override such as --training.learning_rate 3e-4"),
        (["--seed.x", "1"], "seed is not a section of the recipe, it holds 0"),
        (["--list.2", "1"], "a list of 1 entries, number them from 0 to 0"),
        (["--seed", "[1"], "--seed: '[1' is not a YAML value"),
    ],
)
def test_wrong_overrides(tmp_path: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(KdtrainError) as caught:
        read_yaml(write(tmp_path, "seed: 0\nlist: [1]\n"), words)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("training: {a: 1}\nseed: 1\ntraining: {b: 2}\n", "the key training stands twice in one section"),
        ("[" * 5000, "more than 32 levels of nesting"),
        ("a: !!python/object/apply:os.system [ls]\n", "is not a readable YAML file"),
        ("? [1]\n: 2\n", "the key [1] is no word"),
        ("- 1", "must hold sections such as `data:` and `student:`, got list"),
        ("a: {b", "is not a readable YAML file"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(KdtrainError) as caught:
        read_yaml(write(tmp_path, text))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(KdtrainError, match=r"there is no recipe at .*nowhere.yaml"):
        read_yaml(tmp_path / "nowhere.yaml")


def test_differences_name_the_fields() -> None:
    old, new = {"data": {"path": "a"}, "seed": 0}, {"data": {"path": "b"}, "seed": 3}
    assert differences(old, new) == ["data.path: a there, b here", "seed: 0 there, 3 here"]


def test_help_shows_defaults_and_allowed_values() -> None:
    text = describe(Whole_)
    assert "--training.precision (fp32) [fp32, bf16, fp16]" in text
    assert "--training.report_to (none) [tensorboard, wandb, trackio, mlflow]" in text
    assert "--output (needed)" in text


def test_every_field_explains_itself() -> None:
    for name, field in TrainingSection.model_fields.items():
        assert field.description and len(field.description) > 10, name


def test_the_json_schema_names_fields_and_choices() -> None:
    schema = json_schema(Whole_)
    training = schema["$defs"]["TrainingSection"]["properties"]
    assert training["precision"]["enum"] == ["fp32", "bf16", "fp16"]
    assert schema["$defs"]["TrainingSection"]["additionalProperties"] is False


def test_nearest_prefers_the_meaning() -> None:
    assert nearest("lr", ["lr_scheduler_type", "learning_rate"]) == "learning_rate"
    assert nearest("qqqq", ["learning_rate"]) is None
