"""The blocks of docs/integrations.md run as they stand; KDTrainer keeps Trainer's contract."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from kdtrain.errors import KdtrainError
from kdtrain.hf_trainer import KDConfig, KDTrainer, collate_counted
from kdtrain.models.heads import hidden_states
from kdtrain.tasks.code_lm.packing import IGNORED, padded_batch
from tests.language.conftest import tiny
from tests.language.trainer_steps import steps, tokens

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def block(name: str) -> str:
    """The code of one block of the page."""
    return re.findall(rf"```python {name}\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]


def names(tmp_path: Path) -> dict[str, Any]:
    return {
        "student": tiny("llama"),
        "teacher": tiny("qwen3", 1, hidden_size=48),
        "dataset": tokens(),
        "folder": str(tmp_path / "out"),
    }


def test_plain_loop(tmp_path: Path) -> None:
    found = names(tmp_path)
    exec(block("plain"), found)
    halves = [sum(found["losses"][:4]), sum(found["losses"][-4:])]
    assert halves[1] < halves[0], "it learns"


def test_trainer(tmp_path: Path) -> None:
    found = names(tmp_path)
    exec(block("trainer"), found)
    untrained = KDTrainer(
        tiny("llama"),
        found["teacher"],
        args=found["arguments"],
        eval_dataset=tokens(),
        train_dataset=tokens(),
    ).evaluate()
    assert 0 < found["metrics"]["eval_divergence"] < untrained["eval_divergence"]
    assert 0 <= found["metrics"]["eval_agreement"] <= 1
    saved = list((tmp_path / "out").rglob("model.safetensors"))
    assert saved and all(path.stat().st_size < 200_000 for path in saved), "no teacher in the checkpoint"


# TRL 1.16 sets a name that transformers deprecates; ends when TRL uses the new one.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_trl(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, sources: list[str]) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    found = names(tmp_path) | {"tokenizer": tokenizer, "texts": Dataset.from_dict({"text": sources})}
    exec(block("trl"), found)
    assert found["trainer"].state.global_step == 3


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """Pieces with different numbers of labels: the same losses, the same student."""
    known, weights = steps(tmp_path)
    for accumulation in (2, 8):
        found, after = steps(tmp_path, accumulation=accumulation)
        for name, values in known.items():
            assert found[name] == pytest.approx(values, rel=1e-4), name
        for name, tensor in weights.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4)


def test_collated_batches_are_read_right() -> None:
    """Padding on either side and documents that share a row."""
    ids = torch.tensor([[1, 1, 5, 6, 7], [5, 6, 7, 1, 1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.where(mask == 1, ids, IGNORED)
    batch = padded_batch({"input_ids": ids, "labels": labels, "attention_mask": mask})
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [[-100, -100, 6, 7, -100], [6, 7, -100, -100, -100]]
    places = torch.tensor([[0, 1, 0, 1, 2]])
    packed = padded_batch({"input_ids": ids[1:], "labels": ids[1:], "position_ids": places})
    assert packed.labels.tolist() == [[6, -100, 1, 1, -100]]


def test_heads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KdtrainError, match=r"the heads of student and teacher have 300 and 310 rows"):
        KDTrainer(
            tiny("llama"),
            tiny("llama", vocab_size=310),
            args=KDConfig(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=tokens(),
        )


def test_trainer_counts_what_the_loss_counts() -> None:
    """Trainer counts labels[:, 1:] for itself: first tokens of documents, after padding or another document, must not be there."""
    rows = {
        "input_ids": torch.tensor([[1, 1, 5, 6, 7], [5, 6, 7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 0, 0, 1, 2], [0, 1, 0, 1, 2]]),
    }
    rows["labels"] = torch.where(rows["attention_mask"] == 1, rows["input_ids"], IGNORED)
    counted = padded_batch(dict(rows)).labels
    labels = collate_counted(lambda given: given, dict(rows))["labels"]
    assert int((labels[:, 1:] != IGNORED).sum()) == int((counted != IGNORED).sum()) == 5
    assert torch.equal(padded_batch(rows | {"labels": labels}).labels, counted)


def test_batches_without_labels_and_cut_documents_are_told(tmp_path: Path) -> None:
    masked = Dataset.from_dict({"input_ids": tokens(8)["input_ids"], "labels": [[IGNORED] * 24] * 8})
    trainer = KDTrainer(
        tiny("llama"),
        tiny("qwen3", 1),
        args=KDConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to=[]),
        train_dataset=masked,
    )
    with pytest.raises(KdtrainError, match=r"step 1 has no label that counts: all labels .* are -100"):
        trainer.train()
    cut = {
        "input_ids": torch.full((2, 4), 5),
        "labels": torch.full((2, 4), 5),
        "position_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 6, 7]]),
    }
    with pytest.raises(
        KdtrainError, match=r"row 1 .* position 6 stands at its token 2, where 0 or 2 was due"
    ):
        collate_counted(lambda given: given, cut)


def test_positions_that_count_through_the_padding_in_front() -> None:
    """The document behind the padding does not see it, and its first token is not learned from padding."""
    ids = torch.tensor([[1, 1, 5, 6, 7, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, IGNORED)}
    batch = padded_batch(inputs | {"position_ids": torch.arange(6)[None]})
    assert batch.labels.tolist() == padded_batch(inputs).labels.tolist() == [[-100, -100, 6, 7, 9, -100]]
    model = tiny("llama")
    with torch.no_grad():
        hidden, _ = hidden_states(model, batch.input_ids, batch.positions)
        alone = model.base_model(input_ids=ids[:, 2:]).last_hidden_state
    torch.testing.assert_close(hidden[:, 2:], alone)


def test_a_family_that_mixes_documents_takes_padding_behind_only(tmp_path: Path) -> None:
    shape = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2)
    found = KDTrainer(
        BloomForCausalLM(shape),
        tiny("llama"),
        args=KDConfig(output_dir=str(tmp_path), use_cpu=True),
        train_dataset=tokens(),
    )
    rows = [{"input_ids": torch.tensor(list(ids))} for ids in ((1, 1, 5, 6, 7), (5, 6, 7, 1, 1))]
    for row in rows:
        row["attention_mask"] = row["input_ids"].ne(1).long()
        row["labels"] = torch.where(row["input_ids"] == 1, IGNORED, row["input_ids"])
    assert int((found.data_collator(rows[1:])["labels"] != IGNORED).sum()) == 2
    with pytest.raises(KdtrainError, match=r"behind padding .* sees in this student: .* pad on the right"):
        found.data_collator(rows)


def test_a_copied_student_runs_its_own_weights(tmp_path: Path) -> None:
    student = tiny("llama")
    KDTrainer(
        student,
        tiny("qwen3", 1),
        args=KDConfig(output_dir=str(tmp_path), use_cpu=True),
        train_dataset=tokens(),
    )
    copied = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert not copied(input_ids=torch.arange(5)[None]).logits.any()


@pytest.mark.parametrize(
    ("options", "others", "words"),
    [
        ({"divergence": "kl"}, {}, r"method.divergence must be one of forward_kl, .*, got 'kl'"),
        ({"divergence": "jsd", "beta": 1.5}, {}, r"method.divergence jsd: JSD needs 0 < beta < 1, got 1.5"),
        ({"label_smoothing_factor": 0.1}, {}, r"label_smoothing_factor is 0.1"),
        ({}, {"compute_metrics": len}, r"compute_metrics would never be called"),
        ({}, {"args": TrainingArguments(use_cpu=True)}, r"KDConfig, got TrainingArguments"),
        ({"teacher_precision": "fp16"}, {"teacher": "/nowhere"}, r"teacher_precision is 'fp16'"),
    ],
)
def test_what_would_do_nothing_is_refused(
    tmp_path: Path, options: dict[str, Any], others: dict[str, Any], words: str
) -> None:
    args = KDConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    given = {"teacher": tiny("qwen3", 1), "args": args, "train_dataset": tokens(8)} | others
    student = tiny("llama")
    with pytest.raises(KdtrainError, match=words):
        KDTrainer(student, **given)
    with pytest.raises(
        KdtrainError, match="the teacher is the student itself, which would be frozen; load the"
    ):
        KDTrainer(student, student, args=KDConfig(output_dir=str(tmp_path), use_cpu=True))


def test_rows_without_labels_are_told(tmp_path: Path) -> None:
    args = KDConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    bare = tokens(8).remove_columns("labels")
    with pytest.raises(KdtrainError, match=r"a batch holds input_ids and no labels"):
        KDTrainer(tiny("llama"), tiny("qwen3", 1), args=args, eval_dataset=bare).evaluate()
