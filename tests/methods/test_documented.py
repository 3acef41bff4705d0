"""Every method has a section in docs/methods.md and a test named after its paper."""

import re
import sys
from pathlib import Path

from kdtrain.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]


def test_every_method_has_a_section() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### (\w+)$", text, flags=re.MULTILINE)
    assert sorted(sections) == sorted(METHODS)


def test_every_paper_has_a_test() -> None:
    """Of the papers that the first line of a method names; those of the study are tested in tests/train."""
    names = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    docs = "\n".join(str(sys.modules[kind.__module__].__doc__) for kind in METHODS.values())
    papers = {number.replace(".", "_") for number in re.findall(r"\d{4}\.\d{5}", docs)}
    tested_elsewhere = {"1503_02531", "1908_09355", "2205_10536", "2508_15423"}
    missing = {paper for paper in papers - tested_elsewhere if not re.search(rf"def test_\w*{paper}", names)}
    assert not missing
