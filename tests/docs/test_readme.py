"""The README: short enough for one screen, plain sentences, links that lead somewhere."""

import re
from pathlib import Path

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
    assert len(prose(README).split()) <= WORDS


def test_sentences_are_short() -> None:
    lengths = {one: len(one.split()) for one in sentences(README) if "·" not in one}
    longest = max(lengths, key=lambda one: lengths[one])
    assert lengths[longest] <= MOST_WORDS, longest
    assert sum(lengths.values()) / len(lengths) < MEAN_WORDS


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        if not target.startswith(("http://", "https://")):
            assert (ROOT / target).exists(), target


def test_the_two_commands_come_first() -> None:
    head = "\n".join(README.splitlines()[:40])
    assert "make demo" in head and "make test" in head
