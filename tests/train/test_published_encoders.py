"""Published encoders (UniXcoder, ModernBERT) from checkpoint to teacher."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from kdtrain.evaluation.classification import evaluate_run
from kdtrain.methods import method_options
from kdtrain.models.teachers import load_teacher
from kdtrain.recipe import (
    ClassificationRecipe,
    ClassificationTraining,
    DataSection,
    StudentSection,
    TeacherSection,
)
from kdtrain.run import run
from kdtrain.tasks.classification.pairs import tokenize_split
from tests.train.test_teachers import CLASSES, TEXTS, ask, rows_of


def published_tokenizer(family: str, folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE in the layout of a published checkpoint's: the same special tokens, ids and template."""
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    if family == "unixcoder":  # vocab.json of microsoft/unixcoder-base begins so; <encoder-only> is 6
        special = [
            "<s>",
            "<pad>",
            "</s>",
            "<unk>",
            "<mask>",
            "<decoder-only>",
            "<encoder-only>",
            "<encoder-decoder>",
        ]
        roles = dict(zip(("cls", "pad", "sep", "unk", "mask"), special, strict=False))
        roles |= {"bos": "<s>", "eos": "</s>"}
        extra = special[5:]
    else:  # ModernBERT's tokens carry the highest ids, and it has neither bos nor eos
        special, extra = [], []
        roles = {"cls": "[CLS]", "pad": "[PAD]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    rules.train_from_iterator(TEXTS * 4, trainer)
    if family == "modernbert":
        rules.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])
    first, last = roles["cls"], roles["sep"]
    rules.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(token, rules.token_to_id(token)) for token in (first, last)],
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=rules,
        extra_special_tokens=extra,
        model_max_length=64,
        **{f"{role}_token": token for role, token in roles.items()},
    )
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("family", ["unixcoder", "modernbert"])
def test_a_published_encoder_is_fine_tuned_and_teaches(tmp_path: Path, family: str) -> None:
    """From a masked-language-model checkpoint in their layout to a teacher of ckd: the same tokens in both stages."""
    words = published_tokenizer(family, tmp_path / "encoder")
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    shape.update(intermediate_size=32, vocab_size=len(words), pad_token_id=words.pad_token_id)
    torch.manual_seed(6)
    if family == "unixcoder":
        model: Any = RobertaForMaskedLM(RobertaConfig(**shape, max_position_embeddings=66, type_vocab_size=1))
    else:
        ends: dict[str, Any] = {"cls_token_id": words.cls_token_id, "sep_token_id": words.sep_token_id}
        ends |= {"bos_token_id": words.cls_token_id, "eos_token_id": words.sep_token_id}
        model = ModernBertForMaskedLM(ModernBertConfig(**shape, **ends, max_position_embeddings=128))
    model.save_pretrained(tmp_path / "encoder")
    rows = [json.dumps({"code": TEXTS[i % 3] * (1 + i % 2), "label": int(i % 3 == 2)}) for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = DataSection(
        train=str(tmp_path / "rows.jsonl"), valid=str(tmp_path / "rows.jsonl"), classes=CLASSES
    )
    training = ClassificationTraining(max_steps=3, batch_size=8, logging_steps=1)
    tuned = ClassificationRecipe(
        data=data,
        student=StudentSection(path=str(tmp_path / "encoder"), max_length=40),
        method=(method_options("ft"),),
        training=training,
        output=str(tmp_path / "tuned"),
    )
    run(tuned)
    teacher = load_teacher(str(tmp_path / "tuned" / "student"), CLASSES)
    assert words.model_max_length == 64 and teacher.max_length == 40, "the length it was trained at"
    # What was seen in fine-tuning is what is seen in teaching: the saved predictions are the teacher's answers.
    predictions = load_file(tmp_path / "tuned" / "predictions" / "test.safetensors")
    given = rows_of([json.loads(row)["code"] for row in rows])
    torch.testing.assert_close(ask(teacher, given), predictions["logits"], rtol=1e-4, atol=1e-5)
    ids, _ = tokenize_split(given, teacher.tokenizer, 40, None, teacher.insert).batch(torch.tensor([0]))
    if family == "unixcoder":
        assert teacher.insert == (6, 2) and ids[0, :3].tolist() == [0, 6, 2] and ids[0, -1] == 2
    else:
        assert teacher.insert == () and ids[0, 0] == words.cls_token_id and ids[0, -1] == words.sep_token_id
    student = StudentSection(
        vocab_size=300, hidden_size=16, layers=2, heads=2, intermediate_size=32, max_length=40
    )
    recipe = ClassificationRecipe(
        data=data,
        student=student,
        teacher=TeacherSection(path=str(tmp_path / "tuned" / "student")),
        method=(method_options("ckd", window=3),),
        training=training,
        output=str(tmp_path / "student"),
    )
    assert run(recipe).metrics["agreement"] >= 0
    assert evaluate_run(tmp_path / "tuned")["accuracy"] == pytest.approx(
        float((predictions["logits"].argmax(1) == predictions["labels"]).double().mean())
    )
