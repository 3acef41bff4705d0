"""What can be told before any training: a registry of checks, one small function each.

A check takes the subject of its task (whatever its examiner has opened) and gives findings: nothing when all is well.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from kdtrain.errors import KdtrainError

Level = Literal["wrong", "suspicious", "note"]


@dataclass(frozen=True)
class Finding:
    """One sentence that names what was found and what to do."""

    level: Level
    text: str

    def line(self) -> str:
        """As it is printed."""
        return f"{self.level:>10}  {self.text}"


Check = Callable[[Any], Iterable[Finding]]


def wrong(text: str) -> Finding:
    """The run would fail, or teach what was not meant."""
    return Finding("wrong", text)


def suspicious(text: str) -> Finding:
    """The run would work; whether it is what was meant is for the reader to say."""
    return Finding("suspicious", text)


def note(text: str) -> Finding:
    """Something to know."""
    return Finding("note", text)


def examine(subject: object, checks: Iterable[Check]) -> Iterator[Finding]:
    """Run every check; what one refuses with a sentence is a finding like any other."""
    for check in checks:
        try:
            yield from check(subject)
        except KdtrainError as error:
            yield wrong(str(error))
