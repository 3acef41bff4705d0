"""Real checkpoints on real rows, where they are at hand: two students that others distilled from CodeBERT.

Their accuracy over the whole test splits is 59.4 % (devign) and 95.4 % (BigCloneBench sample). Here a part of the rows is
asked, evenly spread; what it must give was worked out once with a plain loop over rows, without batches.
"""

from pathlib import Path

import pytest
import torch

from kdtrain.data.benchmarks import convert_bigclonebench, convert_devign
from kdtrain.data.tokens import token_budget_batches
from kdtrain.models.teachers import load_teacher
from kdtrain.recipe import DataSection, TeacherSection
from kdtrain.tasks.classification.metrics import classification_metrics
from kdtrain.tasks.classification.pairs import tokenize_split
from kdtrain.tasks.classification.splits import ClassificationData, load_classification
from kdtrain.tasks.classification.teacher_outputs import teacher_outputs

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = 120

pytestmark = pytest.mark.skipif(
    not (SHARED / "checkpoints").is_dir(), reason="needs the shared data beside the checkout"
)


def measured(data: ClassificationData, checkpoint: str, order: tuple[int, ...]) -> dict[str, float]:
    """The metrics of a checkpoint over every n-th test row."""
    given = TeacherSection(max_length=400, class_order=order)
    teacher = load_teacher(str(SHARED / "checkpoints" / checkpoint), data.classes, given, pairs=data.pairs)
    assert teacher.tokenizer("int", add_special_tokens=True)["input_ids"][0] == 0
    split = data.test.select(torch.linspace(0, len(data.test) - 1, ROWS).long().tolist())
    rows = tokenize_split(split, teacher.tokenizer, teacher.max_length, None, teacher.insert)
    logits = torch.zeros(len(split), 2)
    for index in token_budget_batches(rows.lengths, 8192):
        logits[index] = teacher_outputs(teacher, rows, index, (), torch.device("cpu")).logits
    return classification_metrics(logits, split.labels)


def test_defect_detection(tmp_path: Path) -> None:
    assert convert_devign(SHARED / "devign", tmp_path)["rows"] == {
        "train": 21854,
        "valid": 2732,
        "test": 2732,
    }
    data = load_classification(DataSection(path=str(tmp_path)))
    metrics = measured(data, "compressor3mb-codebert-defect", (1, 0))
    assert metrics["accuracy"] == pytest.approx(0.594, abs=0.09)  # two standard errors of 120 rows
    assert metrics["accuracy"] > 1 - metrics["accuracy"]


def test_clone_detection(tmp_path: Path) -> None:
    about = convert_bigclonebench(SHARED / "bigclonebench", tmp_path)
    assert about["rows"] == {"train": 90102, "valid": 4000, "test": 4000}
    data = load_classification(DataSection(path=str(tmp_path)))
    metrics = measured(data, "compressor3mb-codebert-clone", ())
    assert metrics["accuracy"] == pytest.approx(0.954, abs=0.04)
    assert metrics["f1"] > 0.9
