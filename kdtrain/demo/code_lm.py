"""A language model of the Python code installed here, distilled: data, tokenizer, teacher, four students, table, pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from kdtrain.console import say
from kdtrain.data.sources import SourceFile, installed_sources, split_of, tree_sources
from kdtrain.demo.code_lm_report import write_language_report
from kdtrain.errors import KdtrainError
from kdtrain.files import write_atomic
from kdtrain.methods import method_options
from kdtrain.models.tokenizers import stored_tokenizer, train_tokenizer
from kdtrain.recipe import (
    LanguageDataSection,
    LanguageRecipe,
    LanguageStudentSection,
    LanguageTeacherSection,
    LanguageTraining,
    MethodOptions,
)
from kdtrain.run import run

TITLES = {
    "ce": "student, next tokens only (CE)",
    "forward_kl": "student, forward KL",
    "skew_kl": "student, skew KL",
    "features": "student, forward KL + hidden MSE",
}


def _methods() -> dict[str, MethodOptions]:
    return {
        "ce": method_options("ft"),
        "forward_kl": method_options("kd", temperature=1.0, ce_weight=0.5),
        "skew_kl": method_options("kd", divergence="skew_kl", temperature=1.0, ce_weight=0.5),
        "features": method_options("kd_features", temperature=1.0, ce_weight=0.5, feature_weight=0.5),
    }


@dataclass(frozen=True)
class LanguageDemoPlan:
    """What the demo trains. The defaults are sized for two cores and five minutes."""

    vocab_size: int = 16384
    train_characters: int = 3_000_000
    valid_characters: int = 60_000
    max_length: int = 256
    teacher: LanguageStudentSection = field(
        default_factory=lambda: LanguageStudentSection(
            hidden_size=160, layers=4, heads=4, intermediate_size=448
        )
    )
    student: LanguageStudentSection = field(
        default_factory=lambda: LanguageStudentSection(
            hidden_size=80, layers=2, heads=2, intermediate_size=224
        )
    )
    batch_size: int = 6
    teacher_steps: int = 320
    steps: int = 140
    methods: Mapping[str, MethodOptions] = field(default_factory=_methods)
    trees: tuple[Path, ...] = ()
    """folders to take the Python code from, in place of what is installed"""


def language_demo(output: Path, plan: LanguageDemoPlan | None = None) -> str:
    """Do everything that is not done yet below `output`; give the report, which is also written there."""
    plan = plan or LanguageDemoPlan()
    say("1/4 data: the Python code installed here, and a tokenizer trained on it")
    texts = write_data(output / "data", plan)
    stored_tokenizer(
        output / "tokenizer",
        lambda: train_tokenizer(texts, vocab_size=plan.vocab_size, max_length=1 << 20),
        "student.tokenizer",
    )
    say("2/4 teacher")
    teacher = demo_recipe(output, plan, "teacher", plan.teacher, plan.teacher_steps)
    forget_peak()
    summaries = {"teacher": run(teacher)}
    say(f"3/4 students: {', '.join(plan.methods)}, {plan.steps} steps each")
    for name, method in plan.methods.items():
        recipe = demo_recipe(output, plan, name, plan.student, plan.steps)
        known = LanguageTeacherSection(path=str(output / "runs" / "teacher" / "student"))
        forget_peak()
        summaries[name] = run(recipe.replaced(teacher=known, method=method))
    say("4/4 report")
    titles = {"teacher": "teacher", **{name: TITLES.get(name, name) for name in plan.methods}}
    return write_language_report(
        output, {titles[name]: one for name, one in summaries.items()}, prompts(output)
    )


def demo_recipe(
    output: Path, plan: LanguageDemoPlan, name: str, student: LanguageStudentSection, steps: int
) -> LanguageRecipe:
    """One run of the demo on labels only; all read the same rows in the same order."""
    return LanguageRecipe(
        data=LanguageDataSection(
            train=str(output / "data" / "train.jsonl"),
            valid=str(output / "data" / "valid.jsonl"),
            max_length=plan.max_length,
        ),
        student=student.replaced(tokenizer=str(output / "tokenizer")),
        method=(method_options("ft"),),
        training=LanguageTraining(
            max_steps=steps,
            batch_size=plan.batch_size,
            learning_rate=3e-3,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            eval_steps=max(1, steps // 2),
            logging_steps=max(1, steps // 20),
        ),
        output=str(output / "runs" / name),
    )


def write_data(folder: Path, plan: LanguageDemoPlan) -> list[str]:
    """Write train.jsonl and valid.jsonl, whole files in an order that a hash gives; the training texts."""
    if not (folder / "train.jsonl").exists():
        found: list[SourceFile] = (
            [file for tree in plan.trees for file in tree_sources(tree)]
            if plan.trees
            else installed_sources()[0]
        )
        found.sort(key=lambda file: hashlib.sha256(file.module.encode()).digest())
        room = {"train": plan.train_characters, "valid": plan.valid_characters}
        kept: dict[str, list[str]] = {"train": [], "valid": []}
        for file in found:
            side = "train" if split_of(file.module) == "train" else "valid"
            if room[side] <= 0:
                continue
            with suppress(UnicodeDecodeError, OSError):
                text = file.path.read_text(encoding="utf-8")
                if 200 < len(text) < 60_000:  # neither stubs nor tables
                    kept[side].append(text)
                    room[side] -= len(text)
        if not kept["train"] or not kept["valid"]:
            raise KdtrainError("too little Python code was found to train and to measure on")
        for side, texts in kept.items():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            write_atomic(folder / f"{side}.jsonl", lines)
    return [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]


def prompts(output: Path, count: int = 3) -> list[str]:
    """Beginnings of functions in held-out files."""
    found = []
    for line in (output / "data" / "valid.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        place = text.find("\n    def ", len(text) // 3)
        if place > 0:
            end = text.find("\n", place + 1)
            found.append(text[max(0, place - 200) : end + 1])
        if len(found) == count:
            break
    return found


def forget_peak() -> None:
    """Let the process's peak memory count anew, so that every run has its own; only Linux can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
