"""The README: short enough for one screen, plain sentences, links that lead somewhere."""

import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from kdtrain.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES, WORDS = 180, 1300
MEAN_WORDS, MOST_WORDS = 18, 35


def prose(text: str) -> str:
    """The text without code, tables, pictures and link targets."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("|", "![", "#")))
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`[^`]*`", "code", text)


def sentences(text: str) -> list[str]:
    """Sentences and list entries of prose."""
    blocks = re.split(r"\n\s*\n|\n- |\n> ", prose(text))
    joined = [" ".join(block.replace(">", " ").split()) for block in blocks]
    return [
        one for block in joined for one in re.split(r"(?<=[.!?:])\s+(?=[A-Z0-9`\[*])", block) if one.strip()
    ]


def test_it_is_one_screen() -> None:
    assert len(README.splitlines()) <= LINES
    assert len(README.split()) <= WORDS


def test_sentences_are_short() -> None:
    lengths = {one: len(one.split()) for one in sentences(README) if "·" not in one}
    longest = max(lengths, key=lambda one: lengths[one])
    assert lengths[longest] <= MOST_WORDS, longest
    assert sum(lengths.values()) / len(lengths) < MEAN_WORDS


def test_the_two_commands_come_first() -> None:
    head = "\n".join(README.splitlines()[:40])
    assert "make demo" in head and "make test" in head


def test_every_command_is_named() -> None:
    for command in COMMANDS:
        assert f"`{command}`" in README or f"`kdtrain {command}`" in README, command


def test_the_lines_of_the_trainer_run(tmp_path: Path) -> None:
    """With a student, a teacher and rows of its own; 100 steps are cut to one."""
    shape: dict[str, Any] = {
        "vocab_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    rows = torch.randint(64, (8, 6)).tolist()
    names: dict[str, Any] = {
        "student": LlamaForCausalLM(LlamaConfig(hidden_size=16, **shape)),
        "teacher": LlamaForCausalLM(LlamaConfig(hidden_size=32, **shape)),
        "dataset": Dataset.from_dict({"input_ids": rows, "labels": rows}),
        "folder": str(tmp_path),
    }
    (code,) = re.findall(r"```python trainer\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 8
    exec(code.replace("max_steps=100", "max_steps=1, use_cpu=True, report_to='none'"), names)
    assert names["trainer"].state.global_step == 1
