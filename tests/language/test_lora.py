"""Low-rank adapters: they alone are trained, and the saved student is a plain model with them merged in."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdtrain.errors import KdtrainError
from kdtrain.evaluation.code_lm import evaluate_language_run
from kdtrain.hf_trainer import KDConfig, KDTrainer
from kdtrain.methods import method_options
from kdtrain.models.heads import check_model
from kdtrain.models.lora import adapted_layers
from kdtrain.recipe import LanguageRecipe, LanguageStudentSection, save_recipe
from kdtrain.run import run
from kdtrain.summary import Summary
from tests.language.conftest import opened, tiny
from tests.language.test_cache import losses, stored
from tests.language.test_processes import FSDP2, finish, launch
from tests.language.trainer_steps import tokens

# peft 0.21 asks transformers 5.23 by names that it is about to drop; ends when peft asks by the new ones.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def recipe(
    language_distillation: LanguageRecipe, language_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> LanguageRecipe:
    """The teacher's own weights as a student, bent a little, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("lora")
    model = AutoModelForCausalLM.from_pretrained(language_teacher)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(language_teacher).save_pretrained(folder / "base")
    return language_distillation.replaced(
        student=LanguageStudentSection(path=str(folder / "base"), lora_rank=4, lora_dropout=0.1),
        method=method_options("kd", temperature=1.0, ce_weight=0.5),
        output=str(folder / "run"),
    )


def test_needs(recipe: LanguageRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        KdtrainError,
        match=r"student.path x has its own shape, so student.layers 2 would do nothing; leave",
    ):
        LanguageStudentSection.parse({"path": "x", "layers": 2, "lora_rank": 4})
    with pytest.raises(KdtrainError, match=r"lora_rank is 4, but a new student has nothing to adapt; name a"):
        recipe.student.replaced(path=None)
    with pytest.raises(KdtrainError, match=r"lora_dropout must be below 1, got 1.0"):
        recipe.student.replaced(lora_dropout=1.0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        KdtrainError, match=r"student.lora_rank needs peft, which is not installed; pip install"
    ):
        opened(recipe)


@pytest.mark.xdist_group("programs")
def test_only_adapters_are_trained_and_the_student_is_plain(recipe: LanguageRecipe) -> None:
    peft = pytest.importorskip("peft")
    parts = opened(recipe)
    trained = {name for name, parameter in parts.objective.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert len(adapted_layers(parts.student)) == 2 * 7
    summary = run(recipe)
    folder = Path(recipe.output)
    found = losses(folder)
    assert found[-1] < 0.9 * found[0] and summary.valid["loss"] == Summary.load(folder).valid["loss"]

    base = load_file(Path(str(recipe.student.path)) / "model.safetensors")
    student = load_file(folder / "student" / "model.safetensors")
    assert base.keys() == student.keys() and not [name for name in student if "lora" in name]
    changed = {name for name in base if not torch.equal(base[name], student[name])}
    assert len(changed) == 14 and not [name for name in changed if "embed" in name or "norm" in name]
    plain = AutoModelForCausalLM.from_pretrained(folder / "student").eval()
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(recipe.student.path)), folder / "adapter"
    ).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, again(ids).logits, rtol=1e-4, atol=1e-4)
    assert summary.student["parameters"] == sum(tensor.numel() for tensor in plain.parameters())
    assert evaluate_language_run(folder)["loss"] == pytest.approx(summary.valid["loss"], rel=1e-4)


def test_frozen_head_takes_a_cross_term(recipe: LanguageRecipe, tmp_path: Path) -> None:
    """Adapters leave the head alone: the stored cross-term gives the losses of the teacher itself, FSDP2 those of one process."""
    pytest.importorskip("peft")
    student = recipe.student.replaced(lora_dropout=0.0)
    training = recipe.training.replaced(max_steps=3, eval_steps=3, logging_steps=1)
    short = recipe.replaced(student=student, training=training)
    run(short.replaced(output=str(tmp_path / "online")))
    found = stored(short, tmp_path, "cross_term")
    run(found)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "online"), rel=1e-5)
    save_recipe(found.replaced(output=str(tmp_path / "two")), tmp_path / "recipe.yaml")
    finish(launch(tmp_path / "recipe.yaml", FSDP2))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
    one, two = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("run", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


def test_models_that_peft_wrapped(tmp_path: Path) -> None:
    """What scripts with their own adapters hand over: body and head are found, and KDTrainer trains the adapters."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama"), config)
    check_model(model, "student", packing=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = KDConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True
    )
    KDTrainer(model, tiny("qwen2", 1), args=arguments, train_dataset=tokens()).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".lora_" in name for name in changed)


def test_wrong_layers(recipe: LanguageRecipe) -> None:
    pytest.importorskip("peft")
    for targets, sentence in (
        (("q_prj",), r"student.lora_targets \['q_prj'\] do not fit LlamaForCausalLM: "),
        (("lm_head",), r"student.lora_targets \['lm_head'\] adapt the head, which has to stay one matrix"),
    ):
        with pytest.raises(KdtrainError, match=sentence):
            opened(recipe.replaced(student=recipe.student.replaced(lora_targets=targets)))
