"""Documents, labels and rows: nothing lost, nothing shifted twice, nothing leaking over a boundary."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from kdtrain.errors import KdtrainError
from kdtrain.recipe import LanguageDataSection
from kdtrain.tasks.code_lm.documents import Documents, load_documents, read_rows, tokenize_documents
from kdtrain.tasks.code_lm.packing import IGNORED, best_fit, pack, padded_batch, shifted_labels

CPU = torch.device("cpu")
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def documents(lengths: list[int], masked: int = 0) -> Documents:
    """Documents whose tokens are numbered through; the first `masked` tokens of each do not count."""
    total = sum(lengths)
    counts = np.concatenate([np.arange(length) >= masked for length in lengths])
    return Documents(np.arange(10, 10 + total, dtype=np.int32), counts, np.array(lengths))


def test_labels_are_the_next_token_of_the_same_document() -> None:
    labels = shifted_labels(documents([3, 1, 4], masked=2))
    assert labels.tolist() == [IGNORED, 12, IGNORED, IGNORED, IGNORED, 16, 17, IGNORED]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 23), min_size=1, max_size=40), st.integers(2, 16), st.booleans())
def test_rows_hold_every_label_once(lengths: list[int], room: int, packing: bool) -> None:
    made = documents(lengths)
    if not (shifted_labels(made) != IGNORED).any():
        return
    rows = pack(made, room, pad_id=1, packing=packing)
    wanted = shifted_labels(made)
    assert sorted(rows.labels[rows.labels != IGNORED].tolist()) == sorted(wanted[wanted != IGNORED].tolist())
    assert int(rows.lengths.max()) <= room
    batch = rows.batch(torch.arange(len(rows)), CPU, width=room + 2)
    for ids, places, labels, length in zip(*(t.tolist() for t in (batch.input_ids, batch.positions, batch.labels)),
                                           rows.lengths.tolist(), strict=True):  # fmt: skip
        assert (
            places[0] == 0
            and places[length] == places[length - 1] + 1
            and labels[length:] == [IGNORED] * (room + 2 - length)
        )
        for i in range(length):
            if labels[i] != IGNORED:
                assert labels[i] == ids[i] + 1  # tokens are numbered through, so the label is the next one
            if places[i]:
                assert ids[i] == ids[i - 1] + 1 and places[i] == places[i - 1] + 1
    assert rows.count(torch.arange(len(rows))) == int((wanted != IGNORED).sum())


@given(st.lists(st.integers(1, 16), max_size=60))
def test_best_fit_uses_each_once_and_never_overflows(sizes: list[int]) -> None:
    bins = best_fit(sizes, 16)
    assert sorted(i for row in bins for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 16 for row in bins)
    assert len(bins) <= 2 * sum(sizes) / 16 + 1


def test_a_document_that_fits_is_never_cut() -> None:
    rows = pack(documents([9, 7, 3, 30, 6]), 10, pad_id=1)
    starts = [i for i, place in enumerate(rows.positions.tolist()) if place == 0]
    sizes = sorted(np.diff([*starts, len(rows.positions)]).tolist())
    assert sizes == [3, 6, 7, 9, 10, 10, 10]


def test_stretches_without_labels_are_left_out_and_none_at_all_is_refused() -> None:
    rows = pack(documents([25], masked=20), 10, pad_id=1)
    assert rows.lengths.tolist() == [10, 5] and rows.counted.tolist() == [1, 4]
    with pytest.raises(KdtrainError, match=r"no token of 2 documents counts: every label is masked"):
        pack(documents([5, 5], masked=5), 10, pad_id=1)


def write(path: Path, rows: list[dict]) -> LanguageDataSection:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return LanguageDataSection(train=str(path))


def counted_text(made: Documents, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What the student learns to say, for each document."""
    ends = made.lengths.cumsum()
    return [
        str(tokenizer.decode(made.tokens[end - length : end][made.counts[end - length : end]].tolist()))
        for end, length in zip(ends, made.lengths, strict=True)
    ]


def test_every_kind_of_row_counts_what_it_should(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = write(tmp_path / "text.jsonl", [{"text": "def f(): pass"}, {"text": "x = 1"}])
    read = tokenize_documents(read_rows(plain.train, "data.train", plain), plain, tokenizer)
    assert counted_text(read, tokenizer) == ["def f(): pass</s>", "x = 1</s>"]
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "def f():", "completion": " return 1"}] * 2)
    read = tokenize_documents(read_rows(pairs.train, "data.train", pairs), pairs, tokenizer)
    assert counted_text(read, tokenizer) == [" return 1</s>"] * 2
    talk = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "a + b"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "a + b + c"},
    ]
    chats = write(tmp_path / "chats.jsonl", [{"messages": talk}])
    with pytest.raises(KdtrainError, match="the tokenizer has no chat template"):
        tokenize_documents(read_rows(chats.train, "data.train", chats), chats, tokenizer)
    tokenizer.chat_template = CHAT
    try:
        read = tokenize_documents(read_rows(chats.train, "data.train", chats), chats, tokenizer)
    finally:
        tokenizer.chat_template = None
    assert counted_text(read, tokenizer) == ["a + b\na + b + c\n"]
    blind = ByT5Tokenizer()  # has no tokenizer.json, and so no offsets
    blind.chat_template = CHAT
    with pytest.raises(KdtrainError, match=r"the tokenizer \(ByT5Tokenizer\) does not say where in a text"):
        tokenize_documents(read_rows(chats.train, "data.train", chats), chats, blind)


def test_a_completion_gets_no_space_of_the_tokenizers(tmp_path: Path) -> None:
    """Llama 2's rules put a space in front of every text; in front of a completion it would be one column too many."""
    characters = ["<s>", "</s>", "<unk>", "▁", "\n", *"abcdefghijklmnopqrstuvwxyz=():"]
    rules = Tokenizer(models.BPE({token: i for i, token in enumerate(characters)}, [], unk_token="<unk>"))
    rules.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rules.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    spaced = PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="</s>", unk_token="<unk>")
    rows = [
        {"prompt": "def f():\n", "completion": "    return x"},
        {"prompt": "a =", "completion": "b"},
        {"prompt": "a", "completion": ""},
    ]
    pairs = write(tmp_path / "pairs.jsonl", rows)
    read = tokenize_documents(read_rows(pairs.train, "data.train", pairs), pairs, spaced)
    whole = [
        spaced.decode(part.tolist()) for part in np.split(read.tokens.astype(int), read.lengths.cumsum()[:-1])
    ]
    assert whole == ["def f():\n    return x</s>", "a =b</s>", "a</s>"]
    assert int(read.counts.sum()) == len("    return x") + len("b") + 3


def test_padding_is_a_token_of_every_model() -> None:
    """A collator may pad with a token that was added for the student alone; the teacher must not meet it."""
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    batch = padded_batch(
        {
            "input_ids": torch.tensor([[5, 6, 999], [999, 7, 8]]),
            "attention_mask": mask,
            "labels": torch.tensor([[5, 6, -100], [-100, 7, 8]]),
        }
    )
    assert batch.input_ids.tolist() == [[5, 6, 0], [0, 7, 8]]
    assert batch.labels.tolist() == [[6, -100, -100], [-100, 8, -100]]


def test_folders_and_held_out_documents(
    tmp_path: Path, sources: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    for i, source in enumerate(sources):
        (tmp_path / f"{i}.py").write_text(source)
    (tmp_path / "broken.py").write_bytes(b"\xff\xfe")
    (tmp_path / "notes.md").write_text("not code")
    recipe = LanguageDataSection(train=str(tmp_path), held_out=0.3)
    train, valid = load_documents(recipe, tokenizer)
    assert len(train) + len(valid) == len(sources) and 5 < len(valid) < 35
    again, _ = load_documents(recipe, tokenizer)
    assert again.fingerprint() == train.fingerprint() != valid.fingerprint()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("{tmp}/none", "there is no file or folder"),
        ("{tmp}", r"holds no file that ends in .py"),
        ("{tmp}/wrong.jsonl", r"has the columns code and none of data.text \(text\)"),
        ("{tmp}/number.jsonl", "column text must hold text, got 3"),
        ("{tmp}/odd.xyz", r"is none of .txt, .jsonl"),
        ("{tmp}/latin.txt", r"latin.txt is not UTF-8 \(.*0xe9"),
        ("{tmp}/empty.jsonl", r"empty.jsonl is empty"),
        (
            "{tmp}/talk.jsonl",
            r"must hold lists of messages with role and content, got \[\{'content': 'x'\}\]",
        ),
    ],
)
def test_wrong_data_is_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, train: str, message: str
) -> None:
    (tmp_path / "wrong.jsonl").write_text('{"code": "x"}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "odd.xyz").write_text("x")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "talk.jsonl").write_text('{"messages": [{"content": "x"}]}\n')
    with pytest.raises(KdtrainError, match=message):
        load_documents(LanguageDataSection(train=train.format(tmp=tmp_path)), tokenizer)
