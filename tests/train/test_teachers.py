"""Teachers of every shape: other tokenizers and modes, one-logit heads, other orders of classes, heads over pairs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from kdtrain.errors import KdtrainError
from kdtrain.methods import method_options
from kdtrain.models.pair_config import PairConfig
from kdtrain.models.students import build_student
from kdtrain.models.teachers import Teacher, load_teacher
from kdtrain.models.tokenizers import train_tokenizer
from kdtrain.recipe import (
    ClassificationRecipe,
    ClassificationTraining,
    DataSection,
    StudentSection,
    TeacherSection,
)
from kdtrain.run import run
from kdtrain.tasks.classification.pairs import tokenize_split
from kdtrain.tasks.classification.rows import TextRows
from kdtrain.tasks.classification.teacher_outputs import (
    filled_store,
    prepare_work,
    store_spec,
    teacher_outputs,
)
from kdtrain.teacher_cache.shard import keys_of
from kdtrain.teacher_cache.verify import verify

CPU = torch.device("cpu")
TEXTS = ["int f(int x) { return x; }", "int g() { return 0; }", "void h(char *p) { free(p); free(p); }"]
CLASSES = ("safe", "vulnerable")


def tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    made = train_tokenizer(TEXTS, vocab_size=320, max_length=64)
    if more:
        made.add_special_tokens({"extra_special_tokens": more["extra"]})
    return made


def roberta(labels: int, folder: Path, words: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(2)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    shape.update(intermediate_size=32, num_labels=labels)
    config = RobertaConfig(
        **shape,
        vocab_size=len(words),
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=1,
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def rows_of(texts: list[str], seconds: list[str] | None = None) -> TextRows:
    return TextRows(texts, torch.zeros(len(texts), dtype=torch.int64), seconds)


def ask(teacher: Teacher, rows: TextRows) -> torch.Tensor:
    tokens = tokenize_split(rows, teacher.tokenizer, teacher.max_length, None, teacher.insert)
    return teacher_outputs(teacher, tokens, torch.arange(len(rows)), (), CPU).logits


def test_one_logit_is_the_log_odds_of_the_second_class(tmp_path: Path) -> None:
    teacher = load_teacher(str(roberta(1, tmp_path, tokenizer())), CLASSES)
    model = RobertaForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        one = torch.cat([model(**teacher.tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    logits = ask(teacher, rows_of(TEXTS))
    torch.testing.assert_close(logits.softmax(1)[:, 1], one[:, 0].sigmoid())
    with pytest.raises(KdtrainError, match="has 1 classes, the data set 3"):
        load_teacher(str(tmp_path), ("a", "b", "c"))


def test_the_order_of_classes_is_the_tasks(tmp_path: Path) -> None:
    folder = roberta(2, tmp_path, tokenizer())
    plain = load_teacher(str(folder), CLASSES)
    turned = load_teacher(str(folder), CLASSES, TeacherSection(class_order=(1, 0)))
    assert torch.equal(ask(plain, rows_of(TEXTS)).flip(1), ask(turned, rows_of(TEXTS)))
    assert plain.outputs_hash() != turned.outputs_hash()
    with pytest.raises(
        KdtrainError, match=r"class_order must name each of the outputs 0 to 1 once, got \[1, 1\]"
    ):
        load_teacher(str(folder), CLASSES, TeacherSection(class_order=(1, 1)))


def test_unixcoders_mode_stands_behind_the_first_token(tmp_path: Path) -> None:
    words = tokenizer(extra=["<encoder-only>"])
    mode = words.convert_tokens_to_ids("<encoder-only>")
    teacher = load_teacher(str(roberta(2, tmp_path, words)), CLASSES)
    tokens = tokenize_split(rows_of(TEXTS), teacher.tokenizer, 12, None, teacher.insert)
    input_ids, _ = tokens.batch(torch.tensor([2]))
    assert input_ids[0, :3].tolist() == [0, mode, 2] and input_ids.shape[1] == 12 and input_ids[0, -1] == 2
    # Stored sequences leave the inserted tokens out, so that token i is the student's token i.
    outputs = teacher_outputs(teacher, tokens, torch.tensor([2, 0]), (1,), CPU, sequences=True)
    assert outputs.lengths is not None and outputs.states is not None
    assert outputs.lengths.flatten().tolist() == [10, int(tokens.lengths[0]) - 2]
    with torch.inference_mode():
        every = teacher.model(input_ids=input_ids, output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(outputs.states[:10, 0], every[[0, *range(3, 12)]])
    assert load_teacher(str(tmp_path), CLASSES, TeacherSection(insert=())).insert == ()
    with pytest.raises(
        KdtrainError, match=r"teacher.insert names '<decoder>', which the tokenizer of .* lacks"
    ):
        load_teacher(str(tmp_path), CLASSES, TeacherSection(insert=("<decoder>",)))


def test_modernbert(tmp_path: Path) -> None:
    words = tokenizer()
    labels: dict[str, Any] = {"num_labels": 2}
    config = ModernBertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        **labels,
        pad_token_id=1,
        bos_token_id=0,
        cls_token_id=0,
        eos_token_id=2,
        sep_token_id=2,
    )
    torch.manual_seed(3)
    ModernBertForSequenceClassification(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), CLASSES)
    spec = store_spec(teacher, focus=None, dtype="float32", layers=(0, 2, 4), sequences=True)
    rows = rows_of(TEXTS)
    accelerator = Accelerator(cpu=True)
    prepare = prepare_work(teacher, rows, None, CPU)
    store = filled_store(tmp_path / "cache", spec, rows.keys(), prepare, accelerator, batch_tokens=1000)
    assert verify(store, keys_of(rows.keys()), prepare, accelerator, count=3, seed=0) == 3


def clone_checkpoint(folder: Path, prefix: str) -> Path:
    """An encoder with CodeXGLUE's head over two first tokens, under CodeXGLUE's names."""
    words = tokenizer()
    single = roberta(2, folder / "single", words)
    encoder = {
        name.replace("roberta.", prefix, 1): tensor
        for name, tensor in load_file(single / "model.safetensors").items()
        if name.startswith("roberta.")
    }
    torch.manual_seed(4)
    head = {"dense.weight": (16, 32), "dense.bias": (16,), "out_proj.weight": (2, 16), "out_proj.bias": (2,)}
    weights = {**encoder, **{f"classifier.{name}": torch.randn(shape) for name, shape in head.items()}}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((single / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["RobertaModel"]}))
    words.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", ["roberta.", "encoder.roberta.", "encoder."])
def test_a_pair_head_of_codexglue(tmp_path: Path, prefix: str) -> None:
    teacher = load_teacher(str(clone_checkpoint(tmp_path, prefix)), ("different", "clone"), pairs=True)
    assert teacher.pairs and teacher.max_length == 64
    logits = ask(teacher, rows_of([TEXTS[0], TEXTS[2]], [TEXTS[1], TEXTS[0]]))
    weights = load_file(tmp_path / "model.safetensors")
    encoder = RobertaForSequenceClassification.from_pretrained(tmp_path / "single").roberta.eval()
    with torch.inference_mode():
        first = [
            encoder(**teacher.tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in TEXTS
        ]
    pair = torch.cat([first[2], first[0]])
    hidden = torch.tanh(weights["classifier.dense.weight"] @ pair + weights["classifier.dense.bias"])
    expected = weights["classifier.out_proj.weight"] @ hidden + weights["classifier.out_proj.bias"]
    torch.testing.assert_close(logits[1], expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_of_pairs_is_none_of_single_texts(tmp_path: Path) -> None:
    folder = clone_checkpoint(tmp_path, "roberta.")
    with pytest.raises(
        KdtrainError, match=r"classifies pairs of texts, and the rows of this task are single"
    ):
        load_teacher(str(folder), ("safe", "vulnerable"))
    single = tmp_path / "single"
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(
        KdtrainError,
        match=r"other shapes than its configuration gives: roberta\.encoder\.layer\.0\.intermediate\.dense\.bias \[\d+\] for \[40\]",
    ):
        load_teacher(str(single), ("safe", "vulnerable"))


def test_a_single_classifier_is_none_of_pairs(tmp_path: Path) -> None:
    folder = roberta(2, tmp_path, tokenizer())
    with pytest.raises(
        KdtrainError, match=r"is no classifier of pairs: it has no classifier.dense.weight \[16, 32\]"
    ):
        load_teacher(str(folder), CLASSES, pairs=True)
    with pytest.raises(KdtrainError, match=r"a teacher of pairs must be a folder with model.safetensors"):
        (folder / "model.safetensors").unlink()
        load_teacher(str(folder), CLASSES, pairs=True)


@pytest.mark.parametrize(("architecture", "method"), [("roberta", "pkd"), ("bigru", "ckd")])
def test_a_student_of_pairs_trains_saves_and_loads(tmp_path: Path, architecture: str, method: str) -> None:
    """From pair files to a student that AutoModel knows, taught by a pair head through the cache."""
    lines = []
    for i in range(40):
        a, b = TEXTS[i % 3], TEXTS[(i // 3) % 3]
        lines.append(json.dumps({"code": f"{a} // {i}", "other": f"{b} // {i}", "label": int(a == b)}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "rows.jsonl")
    recipe = ClassificationRecipe(
        data=DataSection(train=path, valid=path, second="other", classes=("different", "clone")),
        student=StudentSection(
            architecture=architecture,  # type: ignore[arg-type]
            vocab_size=300, hidden_size=16, layers=2, heads=2, intermediate_size=32, max_length=40, dropout=0.0,
        ),
        teacher=TeacherSection(path=str(clone_checkpoint(tmp_path / "teacher", "roberta."))),
        method=(method_options(method),),
        training=ClassificationTraining(max_steps=3, num_train_epochs=2, batch_size=16, gradient_accumulation_steps=2, logging_steps=1, metric_for_best_model="f1"),
        output=str(tmp_path / "run"),
    )  # fmt: skip
    summary = run(recipe)
    assert {"f1", "agreement"} <= summary.metrics.keys()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student").eval()
    assert isinstance(model.config, PairConfig) and model.config.id2label == {0: "different", 1: "clone"}
    predictions = load_file(tmp_path / "run" / "predictions" / "test.safetensors")
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path / "run" / "student")
    row = json.loads(lines[5])
    encoded = words(
        [row["code"], row["other"]], return_tensors="pt", padding=True, truncation=True, max_length=40
    )
    with torch.inference_mode():
        logits = model(encoded["input_ids"][None], encoded["attention_mask"][None]).logits[0]
    torch.testing.assert_close(logits, predictions["logits"][5], rtol=1e-4, atol=1e-5)
    with pytest.raises(
        KdtrainError, match="classifies pairs of texts, and the rows of this task are single texts"
    ):
        load_teacher(str(tmp_path / "run" / "student"), ("different", "clone"))
    single = recipe.replaced(data=DataSection(train=path, valid=path, classes=("different", "clone")))
    plain = single.replaced(method=(method_options("ft"),), teacher=TeacherSection())
    student = StudentSection(path=str(tmp_path / "run" / "student"), max_length=recipe.student.max_length)
    with pytest.raises(
        KdtrainError,
        match=r"student.path: .* classifies pairs of texts, and the rows of this task are single",
    ):
        run(plain.replaced(student=student, output=str(tmp_path / "other")))


def test_a_student_of_pairs_starts_from_what_is_there(tmp_path: Path) -> None:
    """A saved student of pairs and a checkpoint with CodeXGLUE's head keep their heads; any other encoder gets a new one."""
    names = ("different", "clone")
    checkpoint = clone_checkpoint(tmp_path / "checkpoint", "roberta.")
    words = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    ids = torch.randint(5, len(words), (3, 2, 9), generator=torch.Generator().manual_seed(0))

    def start(path: Path, tokenizer: Any = words) -> PreTrainedModel:
        given = StudentSection(path=str(path), max_length=40)
        return build_student(given, tokenizer, names, pairs=True).eval()

    theirs = load_teacher(str(checkpoint), names, pairs=True).model
    first = start(checkpoint)
    first.save_pretrained(tmp_path / "saved")
    words.save_pretrained(tmp_path / "saved")
    again = start(tmp_path / "saved")
    with torch.inference_mode():
        expected = theirs(ids).logits
        assert torch.equal(first(ids).logits, expected) and torch.equal(again(ids).logits, expected)
    assert first.config.id2label == again.config.id2label == {0: "different", 1: "clone"}

    about = tmp_path / "checkpoint" / "single" / "config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "hidden_dropout_prob": 0.3}))
    fresh: Any = start(tmp_path / "checkpoint" / "single")
    assert fresh.classifier.dropout.p == 0.3, "the encoder's own"
    encoder = RobertaForSequenceClassification.from_pretrained(tmp_path / "checkpoint" / "single").roberta
    weights = dict(encoder.named_parameters())
    for name, value in fresh.encoder.named_parameters():
        assert torch.equal(value, weights[name]), name
    assert fresh.classifier.out_proj.weight.shape == (2, 16)

    torch.manual_seed(5)
    bigru = build_student(
        StudentSection(architecture="bigru", hidden_size=8, layers=1, max_length=40), words, names
    )
    bigru.save_pretrained(tmp_path / "bigru")
    grown: Any = start(tmp_path / "bigru")
    assert torch.equal(grown.encoder.layers[0].weight_hh_l0, bigru.bigru.layers[0].weight_hh_l0)  # type: ignore[union-attr]

    more = tokenizer(extra=[f"<{i}>" for i in range(400)])
    with pytest.raises(
        KdtrainError, match=r"knows \d+ tokens, and the tokenizer has \d+; take the tokenizer"
    ):
        start(tmp_path / "saved", more)
    with pytest.raises(KdtrainError, match=r"student.max_length is 65, but .* reads at most 64 tokens"):
        build_student(StudentSection(path=str(checkpoint), max_length=65), words, names, pairs=True)
