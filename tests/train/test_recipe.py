"""Recipes: what is refused, by its sentence, and what comes back unchanged."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from kdtrain.errors import KdtrainError
from kdtrain.recipe import (
    DataRecipe,
    MethodRecipe,
    Recipe,
    StudentRecipe,
    TeacherRecipe,
    TrainingRecipe,
    differences,
    load_recipe,
    read_recipe,
    recipe_from_dict,
    recipe_to_dict,
    save_recipe,
    task_of,
)
from kdtrain.study.plan import load_study, unfold
from kdtrain.tasks.masked_lm.recipe import masked_recipe_from_dict

SECTIONS = (DataRecipe, StudentRecipe, TeacherRecipe, MethodRecipe, TrainingRecipe)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_every_field_explains_itself() -> None:
    for section in (*SECTIONS, Recipe):
        assert section.__doc__
        for field in dataclasses.fields(section):
            assert field.name == "data" or len(field.metadata["help"]) > 10, (section, field.name)


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    recipe = Recipe(
        data=DataRecipe(train="a.jsonl", valid="b.jsonl", classes=("x", "y")),
        method=MethodRecipe(name="kd_features", layer_map=((1, 2), (2, 4))),
        training=TrainingRecipe(clip_norm=float("inf"), learning_rate=1e-5),
        seed=7,
    )
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_overrides_reach_any_field_and_take_yaml_values(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {path: somewhere}\n")
    words = [
        "--training.learning_rate",
        "3e-4",
        "--method.layer_map=[[1, 3]]",
        "--seed",
        "5",
        "--output",
        "there",
    ]
    recipe = load_recipe(path, [*words, "--training.max_steps", "null", "--data.use_unlabelled", "false"])
    assert recipe.training.learning_rate == 3e-4
    assert recipe.method.layer_map == ((1, 3),)
    assert (recipe.seed, recipe.output, recipe.training.max_steps) == (5, "there", None)
    assert recipe.data.use_unlabelled is False


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data: {path: x}\ntraning: {}", "unknown recipe key traning; did you mean training?"),
        ("data: {path: x}\ntraining: {lr: 1}", "unknown recipe key training.lr; did you mean training."),
        (
            "data: {path: x}\nstudent: {hiden_size: 1}",
            "unknown recipe key student.hiden_size; did you mean student.hidden_size?",
        ),
        ("student: {layers: 2}", "a recipe needs a `data:` section"),
        ("data: {path: x, train: y}", "either data.path (a folder) or data.train (a file), and not both"),
        ("data: {}", "either data.path (a folder) or data.train (a file), and not both"),
        ("data: {train: y}", "data.train needs data.valid beside it"),
        ("data: {train: y, valid: z, classes: [a]}", "at least two names, got ['a']"),
        ("data: {path: x}\ntraining: {epochs: many}", "training.epochs must be a whole number, got 'many'"),
        ("data: {path: x}\ntraining: {epochs: 1.5}", "training.epochs must be a whole number, got 1.5"),
        ("data: {path: x}\ntraining: {epochs: true}", "training.epochs must be a whole number, got True"),
        (
            "data: {path: x}\ntraining: {learning_rate: -1}",
            "training.learning_rate must be greater than 0, got -1.0",
        ),
        (
            "data: {path: x}\ntraining: {learning_rate: .nan}",
            "training.learning_rate must be greater than 0, got nan",
        ),
        (
            "data: {path: x}\ntraining: {precision: fp8}",
            "training.precision must be one of fp32, bf16, fp16, got 'fp8'",
        ),
        ("data: {path: x}\ntraining: {batch_size: 4, accumulation: 8}", "cannot be larger, got 8 and 4"),
        ("data: {path: x}\nmethod: {temperature: 0}", "method.temperature must be greater than 0, got 0.0"),
        ("data: {path: x}\nmethod: {kd_weight: -0.5}", "method.kd_weight must be 0 or more, got -0.5"),
        ("data: {path: x}\nmethod: {kd_weight: .inf}", "method.kd_weight must be finite, got inf"),
        ("data: {path: x}\nmethod: {temperature: .inf}", "method.temperature must be finite, got inf"),
        ("data: {path: x}\nmethod: {name: [kd]}", "method.name must be text, got ['kd']"),
        ("data: {path: x}\nstudent: {preset: [a]}", "student.preset must be one of roberta-124M"),
        ("data: {path: x}\nseed: -1", "seed must lie in [0, 2^32), got -1"),
        ("data: {path: x, test: y.jsonl}", "brings its own test, so data.test would do nothing"),
        ("data: {path: x, classes: [a, b]}", "brings its own classes, so data.classes would do nothing"),
        (
            "data: {train: y, valid: z, classes: [a, b, a]}",
            "data.classes must be different names, got ['a', 'b', 'a']",
        ),
        (
            "data: {train: y, valid: z, classes: [no, yes]}",
            "data.classes[0] must be text, got False; YAML reads no, off, yes and on so: put the word into quotes",
        ),
        ("data: {path: x}\nmethod: {layer_map: [[1]]}", "method.layer_map[0] must have 2 entries, got [1]"),
        (
            "data: {path: x}\nstudent: {hidden_size: 30, heads: 4}",
            "a multiple of student.heads, got 30 and 4",
        ),
        ("data: {path: x}\nstudent: {vocab_size: 100}", "student.vocab_size must be at least 300"),
        ("data: {path: x}\nstudent: {dropout: 1}", "student.dropout must lie in [0, 1), got 1.0"),
        (
            "data: {path: x}\nstudent: {path: there, hidden_size: 64, layers: 3}",
            "student.path there brings its own shape, so student.hidden_size 64, student.layers 3 would do nothing",
        ),
        (
            "data: {path: x}\nstudent: {path: there, dropout: 0.0, attention_dropout: 0.2}",
            "student.path there brings its own dropout, so student.dropout 0.0, student.attention_dropout 0.2 would do",
        ),
        (
            "data: {path: x}\nstudent: {path: there, preset: bigru-7M}",
            "leave them out (or student.preset bigru-7M, where they come from)",
        ),
        ("data: {path: x}\nstudent: 3", "student must be a section with fields, got 3"),
        ("- 1", "must hold sections such as `data:` and `student:`, got list"),
        ("data: {path: x", "is not a readable YAML file"),
    ],
)
def test_wrong_recipes_are_told_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(KdtrainError) as caught:
        load_recipe(write(tmp_path, text))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--training.learning_rat", "1"], "did you mean training.learning_rate?"),
        (["--training.learning_rate"], "--training.learning_rate needs a value"),
        (["training.learning_rate=1"], "expected an override such as --training.learning_rate 3e-4"),
        (["--seed.x", "1"], "seed is not a section"),
    ],
)
def test_wrong_overrides(tmp_path: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(KdtrainError) as caught:
        load_recipe(write(tmp_path, "data: {path: x}\nseed: 0\n"), words)
    assert sentence in str(caught.value)


def test_a_section_with_nothing_below_it_says_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {path: x}\nstudent:\ntraining:\n")
    assert load_recipe(path, ["--student.layers", "3"]).student.layers == 3
    study = write(
        tmp_path,
        "common: {training: {epochs: 9}, student: {layers: 1}}\ntasks: {t: {data: {path: x}, student: }}\n"
        "students: {s: {heads: 2}}\nmethods: {plain: {name: ft, training: }}\n",
    )
    (first, *_) = unfold(load_study(study))
    assert (first.recipe.training.epochs, first.recipe.student.layers) == (9, 1)


def test_a_task_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(KdtrainError, match=r"task must be text, got \['a'\]"):
        task_of(read_recipe(write(tmp_path, "task: [a]\n")))


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(KdtrainError, match=r"there is no recipe at .*nowhere.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_differences_name_the_fields() -> None:
    old = recipe_to_dict(Recipe(data=DataRecipe(path="a")))
    new = recipe_to_dict(Recipe(data=DataRecipe(path="b"), seed=3))
    assert differences(old, new) == ["data.path: a there, b here", "seed: 0 there, 3 here"]


def test_the_shipped_recipes_load() -> None:
    names, studies = set(), 0
    for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        task = content.get("task", "classification")
        if task == "classification":
            recipe = load_recipe(path)
            names.add(recipe.method.name)
            assert content["output"] == recipe.output
        elif task == "masked_lm":
            assert masked_recipe_from_dict(content).student.vocab_size == 50_000
        elif task == "study":
            cells = unfold(load_study(path))
            assert len(cells) == 4 * 5 * 3 and len({cell.recipe.output for cell in cells}) == len(cells)
            studies += 1
    assert names == {"ft", "kd", "kd_features"} and studies == 2
