"""KDTrainer as scripts for transformers' Trainer use it: searches, collators of all kinds, arguments that do not fit."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
)

from kdtrain.errors import KdtrainError
from kdtrain.hf_trainer import KDConfig, KDTrainer
from tests.language.conftest import tiny
from tests.language.test_processes import finish, torchrun
from tests.language.trainer_rows import measured
from tests.language.trainer_steps import tokens


def config(folder: Path, **options: Any) -> KDConfig:
    """Two steps."""
    known = {"use_cpu": True, "report_to": [], "save_strategy": "no", "max_steps": 2, "logging_steps": 1}
    return KDConfig(output_dir=str(folder), **known | options)


def losses(trainer: KDTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_search_trains_new_students_with_its_own_weights(tmp_path: Path) -> None:
    """Trainer makes a model for every trial and then sets the arguments; it keeps the result under its own name."""
    options = {"eval_strategy": "steps", "eval_steps": 2}
    found = KDTrainer(
        model_init=lambda: tiny("llama"),
        teacher=tiny("qwen3", 1),
        args=config(tmp_path, **options),
        train_dataset=tokens(),
        eval_dataset=tokens(7),
    )
    searched = {"temperature": 3.0, "ce_weight": 0.0, "divergence": "jsd", "beta": 0.3}
    for settings in (
        {},
        searched,
    ):  # what transformers does for a trial, without the packages that choose the numbers
        found.objective = 1.0
        for name, value in settings.items():
            setattr(found.args, name, value)
        found.train()
    known = KDTrainer(
        model_init=lambda: tiny("llama"),
        teacher=tiny("qwen3", 1),
        args=config(tmp_path, **options, **searched),
        train_dataset=tokens(),
        eval_dataset=tokens(7),
    )
    known.train()
    assert losses(found) == losses(known)


def test_the_loss_stays_where_accelerate_unwraps_the_student(tmp_path: Path) -> None:
    found = KDTrainer(
        tiny("llama"),
        tiny("qwen3", 1),
        args=config(tmp_path, bf16=True),
        train_dataset=tokens(),
        eval_dataset=tokens(7),
    )
    found.train()
    before = found.evaluate()["eval_divergence"]
    found.accelerator.unwrap_model(found.model, keep_fp32_wrapper=False)
    assert found.evaluate()["eval_divergence"] == pytest.approx(before, rel=1e-2)


def test_the_teacher_may_be_a_path(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "teacher"
    tiny("qwen3", 1, vocab_size=310).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = [
        KDTrainer(
            tiny("llama"),
            named,
            args=config(tmp_path),
            eval_dataset=tokens(7),
            processing_class=tokenizer,
            data_collator=default_data_collator,
        ).evaluate()["eval_divergence"]
        for named in (folder, str(folder))
    ]
    assert found[0] == found[1] > 0


def test_a_teacher_whose_folder_lacks_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes one of its two special tokens, and the divergence would be that of two tokens."""
    tiny("gpt_neox").save_pretrained(tmp_path / "teacher")
    names = {"<|endoftext|>": 0, "<|padding|>": 1} | {f"token {i}": i for i in range(2, 300)}
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(names, "token 2")))
    with pytest.raises(
        KdtrainError,
        match=r"teacher.path: .* has no tokenizer files \(it has config.json, .*model.safetensors\)",
    ):
        KDTrainer(
            tiny("llama"),
            tmp_path / "teacher",
            args=config(tmp_path),
            train_dataset=tokens(8),
            processing_class=own,
        )


def test_position_ids_reach_families_that_do_not_read_them(tmp_path: Path) -> None:
    """Trainer drops columns that forward does not name; documents of a row would then see each other in silence."""
    torch.manual_seed(0)
    packed = tokens(8).add_column("position_ids", [[*range(10), *range(14)]] * 8)
    found = KDTrainer(
        BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2)),
        tiny("llama"),
        args=config(tmp_path),
        train_dataset=packed,
    )
    with pytest.raises(KdtrainError, match=r"behind another document, which it sees in this student"):
        found.train()


@pytest.mark.parametrize("told", ["return_seq_idx", "return_flash_attn_kwargs"])
def test_documents_told_apart_in_a_way_that_is_not_read_are_refused(tmp_path: Path, told: str) -> None:
    collate = DataCollatorWithFlattening(return_position_ids=False, **{told: True})
    found = KDTrainer(
        tiny("llama"),
        tiny("qwen3", 1),
        args=config(tmp_path),
        train_dataset=tokens(8),
        data_collator=collate,
    )
    with pytest.raises(KdtrainError, match=r"alone, which is not read, .* return position_ids"):
        found.train()


def test_collators_that_make_several_rows_of_an_example_are_measured_whole(tmp_path: Path) -> None:
    def twice(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in rows for _ in range(2)]) for name in rows[0]}

    found = [
        KDTrainer(
            tiny("llama"),
            tiny("qwen3", 1),
            args=config(tmp_path, per_device_eval_batch_size=4),
            eval_dataset=tokens(7),
            data_collator=collate,
        ).evaluate()["eval_loss"]
        for collate in (twice, default_data_collator)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.xdist_group("programs")
def test_two_processes_measure_every_row_once_or_say_why_not(tmp_path: Path) -> None:
    finish(torchrun(["tests.language.trainer_rows", str(tmp_path)], {}))
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["streamed"] == pytest.approx(measured(tmp_path), rel=1e-6)
    assert found["flat"] == pytest.approx(measured(tmp_path, rows=8), rel=1e-6)
    assert "the collator made 1 rows of 2 examples" in found["flat and odd"]


# peft 0.21 asks transformers 5.23 by names that it is about to drop; ends when peft asks by the new ones.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student, teacher = tiny("llama"), tiny("qwen3", 1)
    tied = copy.deepcopy(student)
    tied.lm_head = student.lm_head
    adapted = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    prompted = peft.get_peft_model(
        tiny("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    sequence = T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2)
    )
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (student, None, {}, r"the teacher is a NoneType; .*, or its folder or hub id"),
        ("folder", teacher, {}, r"the student is a str; KDTrainer takes a causal language model"),
        (sequence, teacher, {}, r"an encoder with a decoder"),
        (prompted, teacher, {}, r"learns virtual tokens"),
        (student, tied, {}, r"holds 1 weights that the student trains \(lm_head.weight"),
        (adapted, adapted.get_base_model(), {}, r"holds 4 weights that the student trains"),
        (student, teacher, {"teacher_precision": "fp16"}, r"teacher_precision is 'fp16'"),
        (student, teacher, {"teacher_precision": "bf16"}, r"loaded already, in torch.float32"),
        (student, teacher, {"kd_weight": 0.0, "ce_weight": 0.0}, r"are both 0"),
    ]
    for model, known, options, words in cases:
        with pytest.raises(KdtrainError, match=words):
            KDTrainer(model, known, args=config(tmp_path, **options), train_dataset=tokens(8))
    assert all(weight.requires_grad for weight in student.parameters()), "nothing was frozen"
    frozen = student.lm_head.requires_grad_(False)
    KDTrainer(student, tied, args=config(tmp_path), train_dataset=tokens(8)).train()
    assert frozen is tied.lm_head, "a frozen head may be the teacher's"
