"""Nothing is loaded with weights or tokens that its files do not hold: every role of every task refuses it by name."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

from kdtrain.errors import KdtrainError
from kdtrain.models.language_teacher import load_causal, load_language_teacher
from kdtrain.models.loading import load_tokenizer
from kdtrain.models.students import build_student
from kdtrain.models.teachers import load_teacher
from kdtrain.models.tokenizers import train_tokenizer
from kdtrain.recipe import MaskedRecipe, StudentSection
from kdtrain.tasks.masked_lm.task import build_masked_student
from tests.support.commands import Program

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("no", "yes")
WORDS = train_tokenizer(["def f(x):\n    return x\n"] * 4, vocab_size=300, max_length=64)
SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 66, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip

Weights = dict[str, torch.Tensor]


def masked_student(path: str) -> Any:
    recipe = MaskedRecipe.parse(
        {"task": "masked_lm", "data": {"train": ["."]}, "student": {"path": path, "max_length": 64}}
    )
    return build_masked_student(recipe, WORDS)


def student(path: str, *, pairs: bool = False) -> Any:
    return build_student(StudentSection(path=path, max_length=64), WORDS, CLASSES, pairs=pairs)


ROLES: dict[str, tuple[Callable[[], Any], Callable[[str], Any]]] = {
    "code_lm teacher": (
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
        lambda path: load_language_teacher(path, "fp32", packing=False),
    ),
    "code_lm student": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), lambda path: load_causal(path, "student.path")),
    "masked_lm student": (lambda: RobertaForMaskedLM(RobertaConfig(**SMALL)), masked_student),
    "classification teacher": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL)),
        lambda path: load_teacher(path, CLASSES),
    ),
    "classification student": (lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL)), student),
    "pair student": (lambda: RobertaModel(RobertaConfig(**SMALL)), lambda path: student(path, pairs=True)),
}  # fmt: skip


def renamed(weights: Weights, config: dict[str, Any]) -> None:
    for name in list(weights):
        weights[f"x.{name}"] = weights.pop(name)


def one_missing(weights: Weights, config: dict[str, Any]) -> None:
    del weights[next(name for name in sorted(weights) if ".0." in name and name.endswith("weight"))]


def one_renamed(weights: Weights, config: dict[str, Any]) -> None:
    name = next(name for name in sorted(weights) if ".0." in name and name.endswith("weight"))
    weights[name.replace("weight", "wright")] = weights.pop(name)


def fewer_layers(weights: Weights, config: dict[str, Any]) -> None:
    config["num_hidden_layers"] = 1


def more_layers(weights: Weights, config: dict[str, Any]) -> None:
    config["num_hidden_layers"] = 5


def other_width(weights: Weights, config: dict[str, Any]) -> None:
    config["intermediate_size"] = 40


def not_a_number(weights: Weights, config: dict[str, Any]) -> None:
    next(weights[name] for name in sorted(weights) if ".0." in name).view(-1)[3] = float("nan")


def infinite(weights: Weights, config: dict[str, Any]) -> None:
    next(weights[name] for name in sorted(weights) if ".0." in name).view(-1)[0] = float("-inf")


DAMAGES: dict[Callable[[Weights, dict[str, Any]], None], str] = {
    renamed: r"it lacks \S+.* it holds x\.\S+, x\.\S+, .*and \d+ more, for which the model has no place",
    one_missing: r"are not those of the \w+ that its config.json describes: it lacks \S*layer\S*\.0\.\S+weight\. Copy",
    one_renamed: r"it lacks \S*layer\S*weight; it holds \S*layer\S*wright, for which the model has no place",
    fewer_layers: r"it holds \S*layer\S*\.1\.\S+, .*for which the model has no place",
    more_layers: r"it lacks \S*layer\S*\.2\.\S+, .*and \d+ more",
    other_width: r"other shapes than its configuration gives: \S+ \[\d+.*\] for \[\d+.*\]",
    not_a_number: r"holds NaN or infinite weights in \S*layer\S*\.0\.",
    infinite: r"holds NaN or infinite weights in \S*layer\S*\.0\.",
}


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    WORDS.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("role", ROLES)
def test_weights_that_are_not_the_models(tmp_path: Path, role: str, damage: Callable[..., None]) -> None:
    make, load = ROLES[role]
    folder = saved(tmp_path / "model", make())
    load(str(folder))  # undamaged, it loads
    weights, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    damage(weights, config)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(KdtrainError, match=DAMAGES[damage]) as caught:
        load(str(folder))
    field = "teacher.path" if "teacher" in role else "student.path"
    assert str(caught.value).startswith(f"{field}: ") and str(folder) in str(caught.value)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", [BertForMaskedLM, RobertaForMaskedLM, RobertaModel])
def test_a_head_that_is_meant_to_be_new(tmp_path: Path, kind: Any, pairs: bool) -> None:
    """An encoder with another task's head, or none, starts a classifier; its body comes along bit for bit."""
    config: Any = (BertConfig if kind is BertForMaskedLM else RobertaConfig)(**SMALL)
    folder = saved(tmp_path / "encoder", kind(config))
    stored = load_file(folder / "model.safetensors")
    started = student(str(folder), pairs=pairs).state_dict()
    for name, value in stored.items():
        if ".layer." in name and "lm_head" not in name:
            own = name[name.index("encoder.layer") :]
            (found,) = (tensor for key, tensor in started.items() if key.endswith(own))
            assert torch.equal(found, value), name


def test_a_head_of_which_half_is_there(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", RobertaForSequenceClassification(RobertaConfig(**SMALL)))
    weights = load_file(folder / "model.safetensors")
    weights["classifier.projection.weight"] = weights.pop("classifier.out_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        KdtrainError, match=r"it lacks classifier\.out_proj\.weight; it holds classifier\.projection"
    ):
        student(str(folder))


@pytest.mark.parametrize("role", ["classification teacher", "code_lm teacher"])
def test_a_folder_without_tokenizer_files(tmp_path: Path, role: str) -> None:
    make, load = ROLES[role]
    make().save_pretrained(tmp_path)
    with pytest.raises(
        KdtrainError,
        match=r"teacher.path: .* has no tokenizer files \(it has config.json, .*model.safetensors\); save",
    ):
        load(str(tmp_path))
    with pytest.raises(KdtrainError, match=r"student.path: .* has no tokenizer files"):
        load_tokenizer(str(tmp_path), "student.path")


def test_a_tokenizer_that_knows_no_code(tmp_path: Path) -> None:
    """Its vocabulary is lost, and transformers fills the gap with a few special tokens."""
    make, load = ROLES["classification teacher"]
    folder = saved(tmp_path / "model", make())
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    with pytest.raises(
        KdtrainError,
        match=r"teacher.path: the tokenizer in .* turns code into unknown tokens only \(it has \d tokens",
    ):
        load(str(folder))


# ---- code of a model folder


def loading_calls() -> list[tuple[str, ast.Call, str]]:
    """Every call in kdtrain that loads or builds by what a folder or hub repository says."""
    found = []
    for path in sorted((ROOT / "kdtrain").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                if name in (
                    "from_pretrained",
                    "from_config",
                    "load_dataset",
                    "snapshot_download",
                    "pipeline",
                ):
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node, name))
    return found


def test_no_call_runs_code_of_a_folder() -> None:
    calls = loading_calls()
    assert {name for _, _, name in calls} == {"from_pretrained", "from_config", "load_dataset"}
    for place, call, name in calls:
        trust = [word.value for word in call.keywords if word.arg == "trust_remote_code"]
        if name == "load_dataset":  # datasets 4 runs no scripts any more, and knows no such argument
            assert not trust, place
        else:
            assert [isinstance(one, ast.Constant) and one.value for one in trust] == [False], place
    loaders = {place.partition(":")[0] for place, _, name in calls if name == "from_pretrained"}
    assert loaders == {"kdtrain/models/loading.py", "kdtrain/models/strict_loading.py"}, (
        "models are loaded in one place, strictly"
    )


EVIL = """
from pathlib import Path
Path(MARK).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.xdist_group("programs")
@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("role", ["--teacher.path", "--student.path", "--student.tokenizer"])
def test_code_in_a_model_folder_does_not_run_on_yes(tmp_path: Path, place: str, role: str) -> None:
    if (place, role) == ("config.json", "--student.tokenizer"):
        pytest.skip("a tokenizer folder's config.json is read for its type only")
    folder = saved(tmp_path / "evil", LlamaForCausalLM(LlamaConfig(**SMALL)))
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.replace("MARK", repr(str(mark))))
    config = json.loads((folder / place).read_text())
    if place == "config.json":
        config["model_type"] = "evil"
        config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    else:
        config["tokenizer_class"] = "EvilTokenizer"
        config["auto_map"] = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    (folder / place).write_text(json.dumps(config))
    WORDS.save_pretrained(tmp_path / "tokenizer")
    rows = (json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n"}) for i in range(40))
    (tmp_path / "code.jsonl").write_text("\n".join(rows))
    shape = f"tokenizer: {tmp_path}/tokenizer, hidden_size: 16, layers: 1, heads: 2, intermediate_size: 32"
    (tmp_path / "recipe.yaml").write_text(
        f"task: code_lm\ndata: {{train: {tmp_path}/code.jsonl, max_length: 32, held_out: 0.3}}\n"
        f"student: {{{'' if role == '--student.path' else shape}}}\n"
        f"method: {{name: {'kd' if role == '--teacher.path' else 'ft'}}}\ntraining: {{max_steps: 1}}\n"
        f"output: {tmp_path}/run\n"
    )
    ended = Program(
        ["kdtrain", "train", str(tmp_path / "recipe.yaml"), role, str(folder)],
        {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        typed="y\n" * 9,
    )
    output, errors = ended.communicate()
    assert not mark.exists(), "the code ran"
    assert ended.returncode == 2 and errors.startswith("kdtrain: "), errors
    assert "custom code" in errors and "run the custom code?" not in output + errors
