"""A language-model run end to end: it learns, leaves what it promises, and does not repeat itself."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from kdtrain.cli import main
from kdtrain.errors import KdtrainError
from kdtrain.evaluation.metrics import read_metrics
from kdtrain.methods import method_options
from kdtrain.methods.base import Step
from kdtrain.methods.ft import FineTuning
from kdtrain.models.tokenizers import train_tokenizer
from kdtrain.recipe import (
    ClassificationRecipe,
    LanguageRecipe,
    LanguageStudentSection,
    LanguageTeacherSection,
    save_recipe,
)
from kdtrain.run import run
from kdtrain.summary import Summary
from kdtrain.tasks.recipes import load_recipe
from tests.language.conftest import opened, tiny


def test_teacher_learns_and_loads_plainly(language_teacher: Path, sources: list[str]) -> None:
    folder = language_teacher.parent
    summary = Summary.load(folder)
    losses = [line["loss"] for line in read_metrics(folder) if "loss" in line]
    assert losses[-1] < 0.6 * losses[0]
    for name in ("recipe.yaml", "metrics.jsonl", "summary.json", "checkpoints"):
        assert (folder / name).exists(), name
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".pkl", ".tmp", ".old")]
    model = AutoModelForCausalLM.from_pretrained(language_teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(language_teacher)
    ids = tokenizer(sources[12], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert float(loss) < 1.5 * summary.valid["loss"]
    assert summary.valid["loss"] == min(
        line["valid/loss"] for line in read_metrics(folder) if "valid/loss" in line
    )


def test_distilled_student_comes_nearer_to_its_teacher(
    language_distillation: LanguageRecipe, tmp_path: Path
) -> None:
    recipe = language_distillation.replaced(output=str(tmp_path / "run"))
    recipe = recipe.replaced(training=recipe.training.replaced(precision="bf16", gradient_checkpointing=True))
    summary = run(recipe)
    found = [
        line["valid/divergence"] for line in read_metrics(tmp_path / "run") if "valid/divergence" in line
    ]
    assert found[-1] < 0.7 * found[0] and 0 < summary.valid["agreement"] <= 1
    student = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert not [name for name in student if "projection" in name or "teacher" in name]
    assert set(load_file(tmp_path / "run" / "projection.safetensors")) == {
        "methods.0.projections.0.weight",
        "methods.0.projections.0.bias",
    }


def test_command_line_and_finished_runs(
    language_recipe: LanguageRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = language_recipe.replaced(
        output=str(tmp_path / "run"),
        training=language_recipe.training.replaced(max_steps=2, eval_steps=2),
    )
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert "already done: run: held-out loss" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "recipe.yaml"), "--training.learning_rate", "0.1"]) == 2
    assert "contains another run (training.learning_rate: 0.01 there, 0.1 here)" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "recipe.yaml"), "--data.maxlength", "0.1"]) == 2
    assert "unknown recipe key data.maxlength; did you mean data.max_length?" in capsys.readouterr().err
    with pytest.raises(KdtrainError, match=r"is a recipe of task code_lm, which cannot be used here"):
        load_recipe(tmp_path / "recipe.yaml", kind=ClassificationRecipe)


def test_what_does_not_fit_is_told(
    language_distillation: LanguageRecipe, language_recipe: LanguageRecipe, sources: list[str], tmp_path: Path
) -> None:
    recipe = language_distillation.replaced(output=str(tmp_path / "run"))
    other: PreTrainedTokenizerFast = train_tokenizer(sources[:3], vocab_size=300, max_length=64)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(KdtrainError, match=r"the tokenizers of student and teacher differ: id \d+ is"):
        run(recipe.replaced(student=recipe.student.replaced(tokenizer=str(tmp_path / "other"))))
    with pytest.raises(KdtrainError, match=r"method kd_features needs a teacher; set teacher.path"):
        opened(recipe.replaced(teacher=recipe.teacher.replaced(path=None), student=language_recipe.student))
    for signal in ("hidden", "topk"):
        stored = recipe.replaced(teacher=recipe.teacher.replaced(signal=signal))
        with pytest.raises(
            KdtrainError, match=r"kd_features \+ relations reads inner layers .*signal: online"
        ):
            opened(stored)
    with pytest.raises(KdtrainError, match=r"teacher.path: there is no folder /nowhere"):
        run(recipe.replaced(teacher=recipe.teacher.replaced(path="/nowhere")))
    model = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=300, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=16))  # fmt: skip
    model.save_pretrained(tmp_path / "qwen2")
    student = LanguageStudentSection(path=str(tmp_path / "qwen2"), tokenizer=recipe.teacher.path)
    with pytest.raises(KdtrainError, match=r"family qwen2 would be loaded with a Qwen2Tokenizer, which cuts"):
        run(recipe.replaced(student=student))
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_tokens_added_for_the_student_alone(language_distillation: LanguageRecipe, tmp_path: Path) -> None:
    """Padding is never read, so the teacher need not know the student's; what the documents hold, it has to read."""
    tokenizer = AutoTokenizer.from_pretrained(str(language_distillation.teacher.path))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "padded")
    tokenizer.add_tokens(["return a"])
    tokenizer.save_pretrained(tmp_path / "added")
    recipe = language_distillation.replaced(
        data=language_distillation.data.replaced(packing=False),
        student=language_distillation.student.replaced(tokenizer=str(tmp_path / "padded")),
        method=method_options("kd", temperature=1.0, ce_weight=0.5),
        training=language_distillation.training.replaced(max_steps=2, eval_steps=2),
        output=str(tmp_path / "run"),
    )
    assert run(recipe).valid["divergence"] > 0
    student = recipe.student.replaced(tokenizer=str(tmp_path / "added"))
    with pytest.raises(
        KdtrainError, match=r"tokens that the teacher cannot read: the first is 287 \('return a'\)"
    ):
        run(recipe.replaced(student=student, output=str(tmp_path / "other")))


def test_a_step_without_memory_is_told_and_the_run_goes_on_with_smaller_pieces(
    language_recipe: LanguageRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator refuses in step 11; with more pieces the same folder ends like a run that had room from the start."""
    recipe = language_recipe.replaced(output=str(tmp_path / "run"))

    def grasp(self: FineTuning, step: Step) -> dict[str, float]:
        if step.number == 10:
            torch.empty(1 << 46)
        return {"ce": 1.0}

    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "weights", grasp)
        with pytest.raises(
            KdtrainError, match=r"the run ran out of memory on cpu .*can't allocate memory"
        ) as told:
            run(recipe)
    for words in (
        "raise training.gradient_accumulation_steps (now 1) or set training.gradient_checkpointing: true",
        f"the same command resumes at step 8 ({tmp_path}/run/checkpoints/step-0000008)",
    ):
        assert words in str(told.value)
    smaller = recipe.training.replaced(gradient_accumulation_steps=3, gradient_checkpointing=True)
    run(recipe.replaced(training=smaller))
    run(recipe.replaced(output=str(tmp_path / "whole")))
    found, known = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("run", "whole"))
    for name, tensor in known.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_rows_longer_than_the_teacher_reads_are_refused(
    language_distillation: LanguageRecipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny("gpt2").save_pretrained(tmp_path)  # 128 positions
    tokenizer.save_pretrained(tmp_path)
    recipe = language_distillation.replaced(
        data=language_distillation.data.replaced(max_length=129),
        teacher=LanguageTeacherSection(path=str(tmp_path)),
        method=method_options("kd", temperature=1.0, ce_weight=0.5),
    )
    with pytest.raises(KdtrainError, match=r"data.max_length is 129, but the teacher reads at most 128"):
        opened(recipe)


@pytest.mark.parametrize("field", ["temperature", "last_temperature", "kd_weight", "last_ce_weight"])
def test_numbers_without_end_are_refused(field: str) -> None:
    """A temperature and a weight, at the first step and at the last."""
    with pytest.raises(KdtrainError, match=f"method.{field} must be finite, got inf"):
        method_options("kd", **{field: float("inf")})
