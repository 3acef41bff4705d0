"""What a command says while it works, and how it shows results.

Progress and remarks go to stderr: one live line on a terminal, `key=value` lines in a file or a pipe. Results go to stdout.
"""

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

PLAIN_SECONDS = 30.0
"""How often, at most, a plain progress line is printed where there is no terminal."""
REFRESH_SECONDS = 0.1
WIDTH = 100
"""Columns of a table on a terminal, at most."""
SHARES = ("accuracy", "top3", "agreement", "name_accuracy")
"""Metrics that are shown as percentages on a terminal."""

_console = Console(stderr=True, highlight=False)
_state = {"quiet": False}


def be_quiet(quiet: bool = True) -> None:
    """Leave out progress and remarks; errors and results stay."""
    _state["quiet"] = quiet


def add_output_options(
    parser: argparse.ArgumentParser, quiet: str = "print no progress; errors and results stay"
) -> None:
    """Add `--json` and `--quiet`.

    Args:
        parser: of a command that measures or trains.
        quiet: the help of `--quiet`.
    """
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help=quiet)


def interactive(stream: TextIO) -> bool:
    """Whether a person looks at the stream: a terminal that can redraw a line, outside of CI."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


# ---- progress


class Bar(Protocol):
    """What a running task may do with its progress line."""

    def update(self, count: int = 1) -> None:
        """Advance by `count` units."""
        ...

    def note(self, text: str = "", **values: float) -> None:
        """Show a remark, or values such as the loss, after the count."""
        ...


class _TerminalBar:
    def __init__(self, line: Progress, total: int, description: str, unit: str, initial: int) -> None:
        self.line, self.drawn = line, 0.0
        self.task = line.add_task(description, total=total, completed=initial, unit=unit, note="")

    def update(self, count: int = 1) -> None:
        self.line.update(self.task, advance=count)
        if time.monotonic() - self.drawn >= REFRESH_SECONDS:
            self.drawn = time.monotonic()
            with _tolerated():
                self.line.refresh()

    def note(self, text: str = "", **values: float) -> None:
        words = [*([text] if text else []), *(shown(name, value) for name, value in values.items())]
        self.line.update(self.task, note="  ".join(words))


class _PlainBar:
    def __init__(self, total: int, description: str, unit: str, initial: int) -> None:
        self.total, self.description, self.unit, self.done = total, description, unit, initial
        self.remark: dict[str, str] = {}
        self.values: dict[str, float] = {}
        self.begun = self.printed = time.monotonic()
        self.initial = initial

    def update(self, count: int = 1) -> None:
        self.done += count
        if time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.printed = time.monotonic()
            pace = (self.printed - self.begun) / max(1, self.done - self.initial)
            counts = {
                self.unit: f"{self.done}/{self.total}",
                "eta_s": f"{pace * (self.total - self.done):.0f}",
            }
            _print(key_values(self.description, {**counts, **self.remark}, self.values))

    def note(self, text: str = "", **values: float) -> None:
        self.remark, self.values = ({"note": shlex.quote(text)} if text else {}), values


class _SilentBar:
    def update(self, count: int = 1) -> None:
        pass

    def note(self, text: str = "", **values: float) -> None:
        pass


@contextmanager
def progress(
    total: int, description: str, *, unit: str = "steps", initial: int = 0, show: bool = True
) -> Iterator[Bar]:
    """A progress line for `total` units.

    Args:
        total: units of the whole task.
        description: what runs, such as the name of the run's folder.
        unit: what is counted.
        initial: units that an earlier process did.
        show: False (other processes than the first) gives a bar that prints nothing.
    """
    if not show or _state["quiet"]:
        yield _SilentBar()
    elif not interactive(sys.stderr):
        yield _PlainBar(total, description, unit, initial)
    else:
        # No thread draws it: a fork of a process with threads may hang.
        line = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, max_width=30)),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
            console=_console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with _tolerated():
            line.start()
        try:
            yield _TerminalBar(line, total, description, unit, initial)
        finally:
            with _tolerated():
                line.stop()


def event(run: str, step: str, values: Mapping[str, float]) -> None:
    """Report values that were measured at a step, such as an evaluation."""
    if interactive(sys.stderr):
        say(f"{run}  step {step}  {'  '.join(shown(name, value) for name, value in values.items())}")
    else:
        say(key_values(run, {"step": step}, values))


def shown(name: str, value: float) -> str:
    """A measured value for people; losses have one format everywhere."""
    if name in SHARES:
        return f"{name} {value:.1%}"
    return f"{value:,.0f} tokens/s" if name == "tokens_per_second" else f"{name} {value:.4f}"


def key_values(run: str, counts: Mapping[str, str], values: Mapping[str, float]) -> str:
    """A line for a file: the time, the run, counts, and values in their plain format."""
    words = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "run": shlex.quote(run), **counts}
    for name, value in values.items():
        words[name] = f"{value:.0f}" if name == "tokens_per_second" else f"{value:.4f}"
    return " ".join(f"{name}={value}" for name, value in words.items())


def human_seconds(seconds: float) -> str:
    """5025 as '1 h 24 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def say(text: str) -> None:
    """Print a remark to stderr without tearing a progress line.

    A log that cannot be written (its reader is gone, its disk is full) does not end what it reports: later lines are dropped.
    """
    if not _state["quiet"]:
        _print(text)


def complain(text: str) -> None:
    """Print an error to stderr, quiet or not."""
    _print(text, style="red")


def _print(text: str, style: str = "") -> None:
    with _tolerated():
        if interactive(sys.stderr):
            _console.print(Text(text, style=style), soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def _tolerated() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError):  # ValueError: it is closed
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, it lives as long as the process


# ---- results


def result(
    arguments: argparse.Namespace,
    text: str,
    content: Any,
    draw: Callable[[], list[RenderableType]] | None = None,
) -> None:
    """Print the result of a command to stdout.

    Args:
        arguments: of the command; `--json` prints `content`.
        text: Markdown for people.
        content: what JSON can hold.
        draw: what a terminal shows in place of the text.
    """
    if arguments.json:
        print(json.dumps(content, indent=2))
    elif draw is not None and interactive(sys.stdout):
        for part in draw():
            _paper().print(part)
    else:
        show(text)


def show(markdown: str) -> None:
    """Print Markdown: as it is into a file or a pipe, with drawn tables on a terminal."""
    if not interactive(sys.stdout):
        print(markdown.rstrip("\n"))
        return
    console = _paper()
    rows: list[list[str]] = []
    for line in [*markdown.rstrip("\n").splitlines(), ""]:
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
            rows.append([re.sub(r"\\([\\|*`$<])", r"\1", cell.strip()) for cell in cells])
            continue
        if rows:
            console.print(drawn(rows))
            rows = []
        console.print(Text(line.lstrip("# "), style="bold") if line.startswith("#") else Text(line))


def _paper() -> Console:
    console = Console(highlight=False)
    console.width = min(WIDTH, console.width)
    return console


def drawn(rows: list[list[str]]) -> Table:
    """A table of Markdown cells: the header, the line below it, the rows."""
    table = Table(box=None, header_style="bold cyan", padding=(0, 1), pad_edge=False)
    header, *body = [row for row in rows if set("".join(row)) - set("-: ")]
    # Figures stay whole, headings wrap between words, and the first column gets the rest; where that does not fit, rich decides.
    cells = [[row[i] for row in body if i < len(row)] for i in range(len(header))]
    widths: list[int | None] = [
        max(map(len, [*name.split(), *column]), default=1) for name, column in zip(header, cells, strict=True)
    ]
    rest = WIDTH - sum(width or 0 for width in widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = min(max(map(len, [header[0], *cells[0]])), rest)
    if rest < 8:
        widths = [None] * len(widths)
    for i, name in enumerate(header):
        justify: Literal["left", "right"] = "right" if i else "left"
        table.add_column(Text(name), justify=justify, overflow="fold", width=widths[i])
    for row in body:
        table.add_row(*(Text(cell.strip("*"), style="bold green" if "**" in cell else "") for cell in row))
    return table
