"""What can be found before any training: a registry of checks, one small function each.

A check takes the subject of its task (whatever its examiner has opened) and yields findings: nothing when all is well.
Every finding has a code that stays the same between versions; docs/troubleshooting.md explains each.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from kdtrain.errors import KdtrainError

Level = Literal["error", "warning", "info"]
GROUPS = {"0": "Start", "1": "Data", "2": "Teacher", "3": "Method and training", "4": "Language model"}
"""By the first digit of the code."""
PAGE = "docs/troubleshooting.md"


@dataclass(frozen=True)
class Finding:
    """One sentence that names what was found and what to do."""

    level: Level
    code: str
    text: str

    @property
    def group(self) -> str:
        """What the finding is about."""
        return GROUPS[self.code[2]]

    @property
    def link(self) -> str:
        """The place in the documentation that explains the code."""
        return f"{PAGE}#{self.code.lower()}"

    def line(self) -> str:
        """One line of plain text."""
        return f"{self.level:<7}  {self.code}  {self.text}"


Check = Callable[[Any], Iterable[Finding]]


def error(code: str, text: str) -> Finding:
    """The run would fail, or learn what was not meant."""
    return Finding("error", code, text)


def warning(code: str, text: str) -> Finding:
    """The run would work; the reader decides whether it is what was meant."""
    return Finding("warning", code, text)


def info(code: str, text: str) -> Finding:
    """Something to know."""
    return Finding("info", code, text)


def refusal(reason: KdtrainError) -> Finding:
    """What a run would refuse, as a finding."""
    return error("KD001", str(reason))


def examine(subject: object, checks: Iterable[Check]) -> Iterator[Finding]:
    """Run every check; a check that refuses is a finding like any other."""
    for check in checks:
        try:
            yield from check(subject)
        except KdtrainError as reason:
            yield refusal(reason)
