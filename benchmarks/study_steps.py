"""What each method of the study costs beside plain training: one step of a classifier, the teacher's outputs in memory.

A step runs objective and backward, clips, and moves the weights, as `kdtrain.loop` does. Settings are those of
`method.preset: study`; rows are full, so that no method gains by padding. Reading the cache from disk is not in it.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.operation import Operation, Step, training_step

CLASSES = 20
METHODS = ("ft", "kd", "kd_features", "dist", "pkd", "ckd")


@dataclass(frozen=True)
class Case:
    """`rows` rows of `length` tokens; the student is a preset of kdtrain, the teacher has the shape of CodeBERT."""

    rows: int = 16
    length: int = 128
    student: str = "roberta-1.5M"
    teacher_width: int = 768
    teacher_layers: int = 12
    device: str = "cpu"

    @property
    def family(self) -> str:
        return "study_step"

    @property
    def name(self) -> str:
        return (
            f"training step of the study, {self.student}, {self.rows} rows of {self.length} tokens, teacher "
            f"{self.teacher_layers} x {self.teacher_width}, float32"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


CPU = (Case(),)
GPU = (Case(32, 512, "roberta-7M", device="cuda"),)
SMOKE = (Case(2, 16, "roberta-0.6M", 16, 4),)


def _contender(name: str) -> Any:
    def contender(case: Case, inputs: torch.Generator) -> Step:
        from kdtrain.methods import build_methods, method_class
        from kdtrain.models.loading import Shape
        from kdtrain.objective import Objective, teacher_layers
        from kdtrain.outputs import Batch
        from kdtrain.recipe.presets import STUDENTS, STUDY
        from kdtrain.tasks.classification.outputs import Classifiers

        shape = STUDENTS[case.student]
        options = method_class(name).Options.parse({"name": name, **STUDY.get(name, {}).get("method", {})})
        methods = build_methods(
            [options],
            "classification",
            Shape(shape["layers"], shape["hidden_size"], True),
            {"teacher": Shape(case.teacher_layers, case.teacher_width, True)},
        )

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=inputs).to(case.device)

        layers = teacher_layers(methods, "teacher")
        mask = torch.ones(case.rows, case.length, dtype=torch.int64, device=case.device)
        stored = {"logits": normal(case.rows, CLASSES)}
        if layers.tokens:
            stored["states"] = normal(case.rows, len(layers.tokens), case.length, case.teacher_width)
            stored["mask"] = mask.bool()
        elif layers.states:
            stored["states"] = normal(case.rows, len(layers.states), case.teacher_width)
        batch = Batch(
            input_ids=torch.randint(300, (case.rows, case.length), generator=inputs).to(case.device),
            labels=torch.randint(CLASSES, (case.rows,), generator=inputs).to(case.device),
            rows=torch.arange(case.rows),
            attention_mask=mask,
            stored={"teacher": stored},
        )
        model = Objective(_student(shape), methods, Classifiers()).to(case.device).train()
        return training_step(model, lambda: model(batch, case.rows)[0])

    return contender


def _student(shape: dict[str, Any]) -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["hidden_size"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            intermediate_size=shape["intermediate_size"],
            max_position_embeddings=shape["max_length"] + 2,
            attention_probs_dropout_prob=0.0,
            type_vocab_size=1,
            id2label=dict(enumerate(map(str, range(CLASSES)))),
        )
    )


OPERATION = Operation(
    case=Case,
    make_inputs=lambda case: torch.Generator().manual_seed(0),
    contenders={name: _contender(name) for name in METHODS},
    leaves=lambda case, inputs: {},
    labels={
        "ft": "FT, labels only",
        "kd": "KD",
        "kd_features": "KD + features",
        "dist": "DIST",
        "pkd": "PKD",
        "ckd": "CKD (contextual relations)",
    },
    tests=("tests/train/test_methods.py",),
    floor="ft",
    floor_name="x plain training",
    tokens=lambda case: case.rows * case.length,
)
