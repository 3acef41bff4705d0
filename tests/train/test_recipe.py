"""Recipes: what is refused, by its sentence, and what comes back unchanged."""

from pathlib import Path

import pytest
import yaml

from kdtrain.errors import KdtrainError
from kdtrain.methods import OPTIONS, method_options
from kdtrain.recipe import (
    ClassificationRecipe,
    ClassificationTraining,
    DataSection,
    LanguageRecipe,
    MaskedRecipe,
    Section,
    differences,
    save_recipe,
)
from kdtrain.study.plan import StudyRecipe, load_study, unfold
from kdtrain.tasks.recipes import RECIPES, load_recipe, recipe_from_dict

START = "task: classification\nmethod: {name: ft}\n"
KD = "task: classification\ndata: {path: x}\nteacher: {path: t}\nmethod: {name: kd, "


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def sections_of(kind: type[Section]) -> set[type[Section]]:
    """A class of recipe, and all its sections."""
    inner = [field.annotation for field in kind.model_fields.values()]
    own = [one for one in inner if isinstance(one, type) and issubclass(one, Section)]
    return {kind}.union(*(sections_of(one) for one in own))


def test_every_field_explains_itself() -> None:
    kinds = set[type[Section]]().union(*(sections_of(kind) for kind in (*RECIPES.values(), StudyRecipe)))
    for section in kinds | set(OPTIONS.values()):
        assert section.__doc__
        for name, field in section.model_fields.items():
            assert name == "name" or len(field.description or "") >= 7, (section, name)


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    recipe = ClassificationRecipe(
        data=DataSection(train="a.jsonl", valid="b.jsonl", classes=("x", "y")),
        method=(method_options("kd_features", layer_map=((1, 2), (2, 4))), method_options("ft")),
        training=ClassificationTraining(max_grad_norm=float("inf"), learning_rate=1e-5),
        seed=7,
    )
    recipe = recipe.replaced(teacher={"path": "t"})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert recipe_from_dict(recipe.plain()) == recipe
    (tmp_path / "one.yaml").write_text("")
    save_recipe(recipe.replaced(method=recipe.method[:1]), tmp_path / "one.yaml")
    assert yaml.safe_load((tmp_path / "one.yaml").read_text())["method"]["name"] == "kd_features"


def test_overrides_reach_any_field_and_take_yaml_values(tmp_path: Path) -> None:
    path = write(tmp_path, KD + "}")
    words = [
        "--training.learning_rate",
        "3e-4",
        "--method.name=kd_features",
        "--method.layer_map=[[1, 3]]",
        "--seed",
        "5",
        "--output",
        "there",
    ]
    words += ["--training.max_steps", "null", "--data.use_unlabelled", "false"]
    recipe = load_recipe(path, words, ClassificationRecipe)
    assert recipe.training.learning_rate == 3e-4
    assert recipe.method == (method_options("kd_features", layer_map=((1, 3),)),)
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
        ("student: {layers: 2}", "data is missing: rows with classes"),
        ("data: {path: x, train: y}", "either data.path (a folder) or data.train (a file), and not both"),
        ("data: {}", "either data.path (a folder) or data.train (a file), and not both"),
        ("data: {train: y}", "data.train needs data.valid too"),
        ("data: {train: y, valid: z, classes: [a]}", "at least two names, got ['a']"),
        (
            "data: {path: x}\ntraining: {num_train_epochs: many}",
            "training.num_train_epochs must be a number, got 'many'",
        ),
        (
            "data: {path: x}\ntraining: {num_train_epochs: true}",
            "training.num_train_epochs must be a number, got True",
        ),
        (
            "data: {path: x}\ntraining: {learning_rate: -1}",
            "training.learning_rate must be greater than 0, got -1",
        ),
        (
            "data: {path: x}\ntraining: {learning_rate: .nan}",
            "training.learning_rate must be greater than 0, got nan",
        ),
        (
            "data: {path: x}\ntraining: {precision: fp8}",
            "training.precision must be one of fp32, bf16, fp16, got 'fp8'",
        ),
        (
            "data: {path: x}\ntraining: {batch_size: 4, gradient_accumulation_steps: 8}",
            "cannot be larger, got 8 and 4",
        ),
        (KD + "temperature: 0}", "method.temperature must be greater than 0, got 0"),
        (KD + "kd_weight: -0.5}", "method.kd_weight must be 0 or more, got -0.5"),
        (KD + "kd_weight: .inf}", "method.kd_weight must be finite, got inf"),
        (KD + "temperature: .inf}", "method.temperature must be finite, got inf"),
        ("task: classification\ndata: {path: x}\nmethod: {name: [kd]}", "method.name must be one of ft, kd"),
        ("data: {path: x}\nstudent: {preset: [a]}", "student.preset must be one of roberta-124M"),
        ("data: {path: x}\nseed: -1", "seed must be 0 or more, got -1"),
        ("data: {path: x, test: y.jsonl}", "has its own test, so data.test would do nothing"),
        ("data: {path: x, classes: [a, b]}", "has its own classes, so data.classes would do nothing"),
        (
            "data: {train: y, valid: z, classes: [a, b, a]}",
            "data.classes must be different names, got ['a', 'b', 'a']",
        ),
        (
            "data: {train: y, valid: z, classes: [no, b]}",
            "data.classes[0] must be text, got False; YAML reads no, off, yes and on so: put the word into quotes",
        ),
        (KD[:-4] + "kd_features, layer_map: [[1]]}", "method.layer_map[0][1] is missing"),
        (
            "data: {path: x}\nstudent: {hidden_size: 30, heads: 4}",
            "a multiple of student.heads, got 30 and 4",
        ),
        ("data: {path: x}\nstudent: {vocab_size: 100}", "student.vocab_size must be 300 or more, got 100"),
        ("data: {path: x}\nstudent: {dropout: 1}", "student.dropout must be below 1, got 1"),
        (
            "data: {path: x}\nstudent: {path: there, hidden_size: 64, layers: 3}",
            "student.path there has its own shape, so student.hidden_size 64, student.layers 3 would do nothing",
        ),
        (
            "data: {path: x}\nstudent: {path: there, dropout: 0.0, attention_dropout: 0.2}",
            "student.path there has its own dropout, so student.dropout 0.0, student.attention_dropout 0.2 would do",
        ),
        (
            "data: {path: x}\nstudent: {path: there, preset: bigru-7M}",
            "leave them out (or student.preset bigru-7M, which sets them)",
        ),
        ("data: {path: x}\nstudent: 3", "student must be a section with fields, got 3"),
        ("- 1", "must hold sections such as `data:` and `student:`, got list"),
        ("data: {path: x", "is not a readable YAML file"),
    ],
)
def test_wrong_recipes_are_told_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(KdtrainError) as caught:
        load_recipe(write(tmp_path, text if text.startswith(("- ", "task")) else START + text))
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
        load_recipe(write(tmp_path, START + "data: {path: x}\nseed: 0\n"), words)
    assert sentence in str(caught.value)


def test_a_section_with_nothing_below_it_says_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, START + "data: {path: x}\nstudent:\ntraining:\n")
    assert load_recipe(path, ["--student.layers", "3"], ClassificationRecipe).student.layers == 3
    study = write(
        tmp_path,
        "task: study\ncommon: {training: {num_train_epochs: 9}, student: {layers: 1}}\ntasks: {t: {data: {path: x}, student: }}\n"
        "students: {s: {heads: 2}}\nmethods: {plain: {name: ft, training: }}\n",
    )
    (first, *_) = unfold(load_study(study))
    assert (first.recipe.training.num_train_epochs, first.recipe.student.layers) == (9, 1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "data: {path: x}",
            "task is missing: write task: and one of classification, code_lm, masked_lm, study",
        ),
        ("task: [a]", "task must be one of classification, code_lm, masked_lm, study, got ['a']"),
        ("task: classifcation", "did you mean classification?"),
        ("task: study", "this is a study of many runs; start it with kdtrain study"),
        ("task: classification\ndata: {path: x}", "method is missing: how the student learns"),
        ("task: classification\ndata: {path: x}\nmethod: []", "method is an empty list"),
        (
            "task: classification\ndata: {path: x}\nmethod: {name: kd}",
            "method kd needs a teacher; set teacher.path to a folder or hub id, or method.name: ft",
        ),
        (START + "data: {path: x}\nmethods: 1", "unknown recipe key methods; did you mean method?"),
        (KD + "window: 3}", "unknown recipe key method.window (valid here: name, divergence"),
        (
            KD + "}\ntraining: {metric_for_best_model: bleu}",
            "must be one of accuracy, f1, top3, macro_f1, loss",
        ),
        ("task: masked_lm\ndata: {train: [x]}\nmethod: {name: ft}", "unknown recipe key method"),
        (
            "task: masked_lm\ndata: {train: [x], site_packages: [y]}",
            "site_packages does nothing with data.kind text",
        ),
        (
            "task: code_lm\ndata: {train: x}\nmethod: {name: ft}\nstudent: {lora_alpha: 8}",
            "student.lora_alpha does nothing without adapters; set student.lora_rank, or leave it out",
        ),
        (
            "task: code_lm\ndata: {train: x}\nmethod: {name: dist}\nteacher: {path: t}",
            "method dist is for task classification, got task: code_lm",
        ),
    ],
)
def test_fields_that_do_not_belong_together(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(KdtrainError) as caught:
        load_recipe(write(tmp_path, text))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_two_tasks_differ_in_task_and_data_only() -> None:
    shared = {"method": {"name": "kd"}, "teacher": {"path": "t"}, "output": "runs/x"}
    rows = recipe_from_dict({"task": "classification", "data": {"path": "x"}, **shared})
    documents = recipe_from_dict({"task": "code_lm", "data": {"train": "x"}, **shared})
    assert isinstance(rows, ClassificationRecipe) and isinstance(documents, LanguageRecipe)
    assert rows.methods == documents.methods
    ours, theirs = rows.training.plain(), documents.training.plain()
    assert {name for name in ours if ours[name] != theirs[name]} == {"metric_for_best_model"}


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(KdtrainError, match=r"there is no recipe at .*nowhere.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_differences_name_the_fields() -> None:
    recipe = ClassificationRecipe(data=DataSection(path="a"), method=(method_options("ft"),))
    changed = recipe.replaced(data=DataSection(path="b"), seed=3)
    assert differences(recipe.plain(), changed.plain()) == [
        "data.path: a there, b here",
        "seed: 0 there, 3 here",
    ]


def test_the_shipped_recipes_load() -> None:
    names, studies = set(), 0
    for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        if content["task"] == "study":
            cells = unfold(load_study(path))
            assert len(cells) == 4 * 5 * 3 and len({cell.recipe.output for cell in cells}) == len(cells)
            studies += 1
            continue
        recipe = load_recipe(path)
        assert content["output"] == recipe.output
        if isinstance(recipe, MaskedRecipe):
            assert recipe.student.vocab_size == 50_000
        names.add(recipe.method_name)
    assert names == {"ft", "kd", "kd_features", ""} and studies == 2
