"""Home-made words of design section 6 stand nowhere that a user reads: README, docs, help, docstrings of public names."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdkernels
import kdtrain
from kdtrain.cli import COMMANDS, add_arguments, command_parsers

ROOT = Path(__file__).resolve().parents[2]
DENIED = (
    "anew",
    "are told",
    "beside",
    "contenders?",
    "dead rows",
    "goes on",
    "heat",
    "in silence",
    "is told",
    "kept entries",
    "kept tokens",
    "lies_over",
    "pieces",
    "quiet machine",
    "refused with a sentence",
    "rows that count",
    "says so",
    "the hole",
    "to the bit",
    "twins",
)
"""As regular expressions."""
WORDS = re.compile(rf"\b({'|'.join(DENIED)})\b", flags=re.IGNORECASE)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def without_code(text: str) -> str:
    """The text with as many lines, but without code."""
    text = re.sub(
        r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE
    )
    return re.sub(r"`[^`\n]*`", "", text)


def denied(text: str, place: str, first: int = 1) -> list[str]:
    """Every denied word with file and line."""
    return [
        f"{place}:{number}: {found[0]}"
        for number, line in enumerate(without_code(text).splitlines(), first)
        for found in WORDS.finditer(line)
    ]


def docstrings() -> Iterator[tuple[str, str]]:
    """Public names of both packages, and the public methods of classes."""
    for package in (kdkernels, kdtrain):
        for name in package.__all__:
            value = getattr(package, name)
            yield f"{package.__name__}.{name}", inspect.getdoc(value) or ""
            for inner, member in vars(value).items() if inspect.isclass(value) else ():
                if callable(member) and not inner.startswith("_"):
                    yield f"{package.__name__}.{name}.{inner}", inspect.getdoc(member) or ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages(page: Path) -> None:
    assert not denied(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))


def test_docstrings() -> None:
    found = [one for name, text in docstrings() for one in denied(text, name)]
    assert not found


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    """Fields of recipes are in docs/reference/recipe.md, which is a page."""
    _, parsers = command_parsers()
    add_arguments(command, parsers[command])
    assert not denied(parsers[command].format_help(), f"kdtrain {command} --help")


def test_a_denied_word_is_found_with_its_line() -> None:
    text = "one\n\n```\nit is told\n```\n`beside` and beside\nTwins\n"
    assert denied(text, "a.md") == ["a.md:6: beside", "a.md:7: Twins"]
