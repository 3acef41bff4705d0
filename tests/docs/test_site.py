"""The site: it builds strictly, every block of Python runs, and sentences are short."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_readme import MOST_WORDS, sentences

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
GUIDES = sorted(
    [
        DOCS / "index.md",
        DOCS / "compatibility.md",
        DOCS / "faq.md",
        DOCS / "glossary.md",
        *(DOCS / f"{name}.md" for name in ("code-lm", "demo", "integrations", "methods", "scaling", "study")),
        DOCS / "troubleshooting.md",
        *(
            path
            for folder in ("get-started", "guides", "migrate", "concepts")
            for path in (DOCS / folder).glob("*.md")
        ),
    ]
)
"""Pages whose blocks stand alone; those of docs/integrations.md run in tests/language/test_integrations.py."""


def blocks() -> list[object]:
    found = []
    for page in [ROOT / "README.md", *GUIDES]:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start(1)) + 1
            name = f"{page.relative_to(ROOT)}:{line}"
            found.append(pytest.param(match[1], line, page, id=name))
    return found


NAMES_OF_TYPES = {"IGNORE_INDEX", "Divergence", "Impl", "Reduction", "Teacher"}
"""Constants and unions, which the arguments' own descriptions spell out."""


@pytest.mark.parametrize(("code", "line", "page"), blocks())
def test_blocks_run(code: str, line: int, page: Path) -> None:
    # The empty lines before it give a traceback the lines of the page.
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "block"})


def test_it_builds_strictly(tmp_path: Path) -> None:
    """Links, anchors and docstrings of the reference; the site is written elsewhere."""
    pytest.importorskip("zensical")
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    shutil.copytree(DOCS, tmp_path / "docs")
    paths = f"paths: [{ROOT / 'kernels'}, {ROOT}]"
    (tmp_path / "mkdocs.yml").write_text(configuration.replace("paths: [kernels, .]", paths))
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    losses = (tmp_path / "site" / "reference" / "losses.html").read_text(encoding="utf-8")
    assert 'id="kdkernels.linear_kd_loss"' in losses
    for argument in ("student_hidden", "temperature", "num_items_in_batch", "vocab_group"):
        assert argument in losses


def test_every_public_name_of_the_losses_is_in_the_reference() -> None:
    import kdkernels

    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    missing = [
        name
        for name in kdkernels.__all__
        if f"::: kdkernels.{name}\n" not in pages and name not in NAMES_OF_TYPES
    ]
    assert not missing


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(DOCS)))
def test_sentences_are_short(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for sentence in sentences(text):
        assert len(sentence.split()) <= MOST_WORDS, sentence


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "dev/LOG.md"])
def test_links_outside_of_the_site_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", line):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{name}:{number}: {target}"
