"""The console: one live line on a real pseudo-terminal, `key=value` lines in a pipe, JSON and quiet on request."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kdtrain import console
from kdtrain.cli import main
from kdtrain.recipe import ClassificationRecipe, save_recipe

COLUMNS = 100
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A pseudo-terminal of 100 columns, read by a thread until its last writer is gone."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        self.content = b""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self.master, 4096):
                self.content += part
        except OSError:  # no writer is left
            pass

    def text(self) -> str:
        """All that was written, once the writers are gone."""
        os.close(self.slave)
        self.reader.join()
        os.close(self.master)
        return self.content.decode()


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "COLUMNS")}
    return {**kept, "TERM": "xterm-256color", **more}


def lines(text: str) -> list[str]:
    """Lines as they were drawn, without colours and cursor movements."""
    return [line for line in re.split(r"[\r\n]+", ESCAPES.sub("", text)) if line.strip()]


@contextmanager
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """stdout and stderr of this process are a terminal; the function that comes returns what was drawn."""
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", str(COLUMNS))):
        monkeypatch.setenv(name, value)
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    terminal = Terminal()
    out = os.fdopen(os.dup(terminal.slave), "w")
    drawn: list[str] = []

    def text() -> str:
        if not drawn:
            out.close()
            drawn.append(terminal.text())
        return drawn[0]

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        patched.setattr(sys, "stderr", out)
        patched.setattr(console, "_console", console.Console(stderr=True, highlight=False))
        try:
            yield text
        finally:
            text()


@pytest.fixture
def saved(recipe: ClassificationRecipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    training = recipe.training.replaced(max_steps=6, eval_steps=3)
    save_recipe(recipe.replaced(output=str(tmp_path / "run"), training=training), path)
    return path


def test_a_run_on_a_terminal_and_the_same_run_in_a_pipe(saved: Path, tmp_path: Path) -> None:
    terminal = Terminal()
    words = [sys.executable, "-m", "kdtrain", "train", str(saved)]
    done = subprocess.run(words, stdout=terminal.slave, stderr=terminal.slave, env=environment(), timeout=300)
    text = terminal.text()
    assert done.returncode == 0, text
    drawn = lines(text)
    assert any(
        re.search(r"run .* 6/6 steps eta \d+:\d\d +loss \d\.\d{4}  [\d,]+ tokens/s", line) for line in drawn
    ), drawn
    assert any(re.match(r"run  step 3/6  accuracy \d+\.\d%  .*loss \d\.\d{4}", line) for line in drawn), drawn
    assert "time=" not in text and "\x1b[" in text
    assert all(len(line) <= COLUMNS for line in drawn if "steps eta" in line)

    again = [*words, "--output", str(tmp_path / "piped")]
    piped = subprocess.run(again, capture_output=True, text=True, env=environment(), timeout=300)
    assert piped.returncode == 0 and "\x1b" not in piped.stderr and piped.stdout == ""
    evaluations = [line for line in piped.stderr.splitlines() if line.startswith("time=")]
    assert len(evaluations) == 2
    for line, step in zip(evaluations, ("3/6", "6/6"), strict=True):
        fields = dict(word.split("=") for word in line.split())
        assert fields["run"] == "piped" and fields["step"] == step
        assert 0 <= float(fields["accuracy"]) <= 1 and float(fields["loss"]) > 0


def test_quiet_and_json(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(saved), "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.startswith("run: test accuracy ")
    assert main(["train", str(saved), "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["training"]["steps"] == 6 and said.err == ""
    run = str(tmp_path / "run")
    assert main(["evaluate", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 40
    assert main(["train", "nowhere.yaml", "--quiet"]) == 2
    assert capsys.readouterr().err == "kdtrain: there is no recipe at nowhere.yaml\n"
    assert main(["evaluate", run]) == 0
    assert main(["methods", "--json"]) == 0
    printed = capsys.readouterr().out
    methods = json.loads(printed[printed.index("\n[") :])
    assert {"name", "summary", "tasks", "needs"} == set(methods[0])


def test_findings_on_a_terminal(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_a_terminal(monkeypatch) as text:
        assert main(["doctor", str(saved), "--training.max_grad_norm", ".inf"]) == 0
        drawn = lines(text())
    assert any(re.match(r"Data +[✓!] +KD10\d +\S", line) for line in drawn), drawn
    assert any(re.search(r"! +KD305 +training.max_grad_norm is inf", line) for line in drawn), drawn
    assert all(len(line) <= COLUMNS for line in drawn)
    assert re.match(r"0 errors, \d+ warnings?; docs/troubleshooting.md explains every code", drawn[-1])


def test_a_table_fits_and_keeps_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = [f"{number}.{number}% [{number}.1%, {number}.9%]" for number in range(11, 15)]
    header = "| model | test accuracy | top-3 accuracy | agreement with the teacher | trained in |"
    row = f"| a student with a rather long name | {' | '.join(figures)} |"
    markdown = f"# Results\n\n{header}\n|---|---|---|---|---|\n{row}\n| **best** | 1 | 2 | 3 | 4 |\n"
    with on_a_terminal(monkeypatch) as text:
        console.show(markdown)
        drawn = text()
    assert "|" not in drawn and "**" not in drawn and "\x1b[1;36m" in drawn
    plain = lines(drawn)
    assert plain[0] == "Results" and all(len(line) <= COLUMNS for line in plain)
    squeezed = "".join("".join(plain).split())
    for figure in figures:
        for word in figure.split():
            assert word in squeezed or word in "".join(plain), (word, plain)


def test_no_color_and_ci_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_a_terminal(monkeypatch) as text:
        monkeypatch.setenv("NO_COLOR", "1")
        console.show("| a | b |\n|---|---|\n| 1 | 2 |")
        assert "[1;36m" not in text()
    with on_a_terminal(monkeypatch) as text:
        monkeypatch.setenv("CI", "true")
        console.show("| a | b |\n|---|---|\n| 1 | 2 |")
        assert lines(text()) == ["| a | b |", "|---|---|", "| 1 | 2 |"]


def test_a_terminal_that_goes_away_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("CI", raising=False)
    gone = os.fdopen(slave, "w")
    monkeypatch.setattr(sys, "stderr", gone)
    monkeypatch.setattr(console, "_console", console.Console(stderr=True, highlight=False))
    counted = 0
    with console.progress(5, "work") as bar:
        os.close(master)
        for _ in range(5):
            console.say("a remark")
            bar.note(loss=1.0)
            bar.update()
            counted += 1
    assert counted == 5 and sys.stderr.name == os.devnull
    sys.stderr.close()
    with suppress(OSError):
        gone.close()


def test_a_mistyped_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err.startswith(
        "kdtrain: unknown command trian; did you mean train? (commands: demo"
    )
