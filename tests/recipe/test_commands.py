"""Commands that print: versions, methods, schemas, recipes with every default; and words in any order."""

import json
from pathlib import Path

import pytest
import yaml

import kdtrain
from kdtrain.cli import main, split_overrides
from kdtrain.methods import METHODS
from kdtrain.recipe.load import read_yaml
from kdtrain.tasks.recipes import RECIPES, recipe_from_dict

CONTENT = "task: classification\ndata: {path: nowhere}\nteacher: {path: t}\nmethod: {name: kd}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(CONTENT)
    return tmp_path / "recipe.yaml"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_fields_stand_before_or_after_the_recipe(
    path: Path, capsys: pytest.CaptureFixture[str], first: bool
) -> None:
    fields = ["--training.learning_rate", "3e-4", "--seed=5"]
    words = [*fields, str(path)] if first else [str(path), *fields]
    found = yaml.safe_load(printed(capsys, "train", "--print-config", *words))
    assert (found["training"]["learning_rate"], found["seed"]) == (3e-4, 5)


def test_the_printed_recipe_is_the_one_that_is_used(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "train", str(path), "--print-config")
    recipe = recipe_from_dict(read_yaml(path))
    assert yaml.safe_load(text) == recipe.plain()
    assert list(yaml.safe_load(text)) == [
        "task", "data", "student", "teacher", "method", "training", "output", "seed",
    ]  # fmt: skip
    assert recipe_from_dict(yaml.safe_load(text)) == recipe
    study = Path(__file__).parents[2] / "recipes" / "exceptions-quick.yaml"
    assert yaml.safe_load(printed(capsys, "study", str(study), "--print-config"))["seeds"] == [0, 1, 2]


def test_words_of_a_command_and_fields_of_its_recipe() -> None:
    own, fields = split_overrides(
        ["--rows", "4", "r.yaml", "--seed", "-1", "--verify", "--a.b=c"], {"--rows", "--verify"}
    )
    assert own == ["--rows", "4", "r.yaml", "--verify"]
    assert fields == ["--seed", "-1", "--a.b=c"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian", "x.yaml"], "unknown command trian; did you mean train? (commands: demo, data, train,"),
        (["qqqq"], "unknown command qqqq (commands: demo,"),
        (["methods", "kdd"], "unknown method kdd; did you mean kd?"),
        (["train", "RECIPE", "--training.lr", "1"], "training.lr; did you mean training.learning_rate?"),
        (["train", "RECIPE", "--output"], "--output needs a value"),
        (["train", "--print-config", "nowhere.yaml"], "there is no recipe at nowhere.yaml"),
    ],
)
def test_wrong_words_are_one_line(
    path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main([str(path) if word == "RECIPE" else word for word in words]) == 2
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert sentence in text and text.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert text.startswith("kdtrain ") and "torch " in text and "transformers " in text


def test_every_method_is_listed_with_tasks_needs_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "methods")
    for name, kind in METHODS.items():
        own = text.partition(f"\n{name}\n" if not text.startswith(f"{name}\n") else f"{name}\n")[2]
        _, tasks, *_ = own.splitlines()
        assert tasks.startswith(f"    tasks: {', '.join(sorted(kind.tasks))}; needs: "), name
    assert "tasks: classification, code_lm, masked_lm; needs: labels" in text
    kd = printed(capsys, "methods", "kd")
    assert "--method.temperature (2.0)" in kd and "--method.last_ce_weight (none)" in kd


@pytest.mark.parametrize("task", list(RECIPES))
def test_schemas_describe_what_a_recipe_may_hold(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(printed(capsys, "schema", task))
    assert schema["additionalProperties"] is False and "task" in schema["required"]
    assert schema["properties"]["task"]["const"] == task
    for reference in _references(schema):
        assert reference.removeprefix("#/$defs/") in schema["$defs"], reference
    if task == "masked_lm":
        assert "method" not in schema["properties"]
        return
    one, several = schema["properties"]["method"]["oneOf"]
    assert several["items"] == one
    names = {choice["$ref"].removeprefix("#/$defs/method_") for choice in one["oneOf"]}
    assert names == {name for name, kind in METHODS.items() if task in kind.tasks}
    kd = schema["$defs"]["method_kd"]
    assert kd["additionalProperties"] is False and "name" in kd["required"]
    assert kd["properties"]["name"]["const"] == "kd" and kd["properties"]["temperature"]["default"] == 2.0
    assert kd["properties"]["preset"]["const"] == "study"


def _references(value: object) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for inner in value.values() for found in _references(inner)]
    return [found for inner in value for found in _references(inner)] if isinstance(value, list) else []


def test_help_of_a_recipe_lists_its_own_task_and_methods(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train", str(path), "--help"])
    text = capsys.readouterr().out
    assert "fields of a recipe of task classification" in text and "task code_lm" not in text
    assert "--method.kd_weight (1.0)" in text and "--method.window" not in text
    assert "--training.precision (fp32) [fp32, bf16, fp16]" in text


def test_public_names(path: Path) -> None:
    from kdtrain import KDConfig, KDTrainer, load_recipe, train

    assert set(kdtrain.__all__) == {"KDConfig", "KDTrainer", "KdtrainError", "load_recipe", "train"}
    assert load_recipe(path).method_name == "kd"
    assert issubclass(KDConfig, object) and KDTrainer.__name__ == "KDTrainer" and callable(train)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = kdtrain.nothing
