"""The report of a study: names that Markdown, HTML or a spreadsheet would read as something else; the page in a browser."""

import csv
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kdtrain.study.report import Best, Table, _csv, _page

ODD = ["<img src=x onerror=alert(1)>", "a|b", r"$\frac{1}{2}$", "**bold**", "`code`", "kd_features"]
TABLE = Table(
    "Results of <b>",
    ("student", "accuracy", "p"),
    (("small", "9.5 ± 0.1", "< 0.001"), ("large", Best("12.0 ± 0.3"), "0.020"), ("none", "", "")),
)


def page(*tables: Table) -> str:
    svg = "<svg width='1200' height='10' xmlns='http://www.w3.org/2000/svg'><text>label</text></svg>"
    return _page().render(name="study <1>", introduction="a & b", tables=tables, figures=[('title "1"', svg)])


class Cells(HTMLParser):
    """The text of every cell, and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "td":
            self.cells[-1] += data.strip()


def test_names_stay_text_in_html() -> None:
    found = Cells(page(Table("odd", ("name",), tuple((name,) for name in ODD))))
    assert found.cells == ODD
    assert "img" not in found.tags and "b" not in found.tags


def test_names_stay_text_in_markdown() -> None:
    lines = Table("odd", ("name", "best"), tuple((name, Best("1.0")) for name in ODD)).markdown().splitlines()
    rows = lines[4:]
    assert len(rows) == len(ODD)
    for name, row in zip(ODD, rows, strict=True):
        assert row.endswith(" | **1.0** |")
        cell = row.removeprefix("| ").removesuffix(" | **1.0** |")
        # Every sign that Markdown reads has a backslash, and without them the text is the name.
        assert "<" not in cell.replace(r"\<", "") and "|" not in cell.replace(r"\|", "")
        assert cell.replace("\\\\", "\0").replace("\\", "").replace("\0", "\\") == name


def test_a_spreadsheet_runs_nothing() -> None:
    lines = [{"student": "=HYPERLINK(1)", "difference": -0.5}, {"student": "+1", "difference": 2.0}]
    rows = list(csv.DictReader(_csv(lines).splitlines()))
    assert [row["student"] for row in rows] == ["'=HYPERLINK(1)", "'+1"]
    assert [float(row["difference"]) for row in rows] == [-0.5, 2.0], "numbers stay numbers"


BROWSER = """
import json, sys
from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

application = QApplication([sys.argv[0], "--no-sandbox", "--disable-gpu"])
view = QWebEngineView()
view.resize(390, 800)
SCRIPT = '''(() => {
  const button = document.querySelectorAll("th button")[1];
  const names = () => [...document.querySelectorAll("tbody tr")].map(row => row.cells[0].textContent);
  const found = {before: names()};
  button.click(); found.up = names();
  button.click(); found.down = names();
  found.sort = button.parentElement.getAttribute("aria-sort");
  found.wide = document.documentElement.scrollWidth > window.innerWidth;
  found.figure = document.querySelector("svg text").textContent;
  return JSON.stringify(found);
})()'''

def finish(text):
    print(text)
    application.quit()

view.loadFinished.connect(lambda ok: QTimer.singleShot(300, lambda: view.page().runJavaScript(SCRIPT, finish)))
view.load(QUrl.fromLocalFile(sys.argv[1]))
view.show()
application.exec()
"""


def test_the_page_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the width of a phone: headers sort, nothing is wider than the page, the figure's text is text."""
    pytest.importorskip("PyQt6.QtWebEngineWidgets", reason="needs a browser: pip install PyQt6-WebEngine")
    (tmp_path / "report.html").write_text(page(TABLE), encoding="utf-8")
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    monkeypatch.setenv("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu")
    command = [sys.executable, "-c", BROWSER, str(tmp_path / "report.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)
    assert found["before"] == ["small", "large", "none"]
    assert found["up"] == ["small", "large", "none"] and found["down"] == ["large", "small", "none"]
    assert found["sort"] == "descending" and not found["wide"] and found["figure"] == "label"
