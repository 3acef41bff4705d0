"""docs/reference/run-folder.md names every file that a run leaves."""

import json
import re
from pathlib import Path

from kdtrain.cli import main
from kdtrain.recipe import ClassificationRecipe
from kdtrain.run import run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "run-folder.md"


def test_every_file_of_a_run_is_on_the_page(distillation: ClassificationRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(distillation.replaced(output=str(folder)))
    assert main(["evaluate", str(folder)]) == 0
    text = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    for file in folder.iterdir():
        assert (f"{file.name}/" if file.is_dir() else file.name) in named, file.name
    for file in (folder / "checkpoints").iterdir():
        name = re.sub(r"-\d+$", "-N", file.name)
        assert (f"{name}/" if file.is_dir() else name) in named, file.name
    summary = json.loads((folder / "summary.json").read_text())
    for name in summary["training"]:
        assert name in text, name
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for name in json.loads(line):
            assert name in text or name.partition("/")[0] + "/" in text, name
