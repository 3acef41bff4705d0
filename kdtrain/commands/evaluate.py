"""kdtrain evaluate RUN."""

import argparse
from pathlib import Path
from typing import Any

from kdtrain.console import add_output_options, result
from kdtrain.errors import KdtrainError
from kdtrain.files import human_bytes, write_json
from kdtrain.recipe import read_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run's folder, the split, and another run to compare with."""
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument(
        "--split",
        choices=("test", "valid"),
        help="rows to measure on (default: test); a language model is always measured on its held-out rows",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="RUN",
        help="another run: print the paired difference of accuracy, or of held-out loss",
    )
    add_output_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure the saved student again, print the figures and keep them in evaluation.json."""
    path = arguments.run / "recipe.yaml"
    of_language_model = path.is_file() and read_yaml(path).get("task") == "code_lm"
    lines, found = (evaluate_language_model if of_language_model else evaluate_classifier)(arguments)
    write_json(arguments.run / "evaluation.json", found)
    result(arguments, "\n".join(lines), found)
    return 0


def evaluate_classifier(arguments: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The figures of a run of task classification: as lines, and as they are kept."""
    from kdtrain.evaluation.classification import compare_runs, evaluate_run

    split = arguments.split or "test"
    compared = None  # errors come first: measuring takes time
    if arguments.against is not None:
        compared = arguments.against.name, *compare_runs(arguments.run, arguments.against, split)
    found = evaluate_run(arguments.run, split)
    low, high = found["accuracy_interval"]
    lines = [
        f"rows                     {found['rows']}",
        f"accuracy                 {found['accuracy']:.1%}  95 % interval [{low:.1%}, {high:.1%}]",
        f"top-3 accuracy           {found['top3']:.1%}",
        f"macro F1                 {found['macro_f1']:.4f}",
        *([f"agreement with teacher   {found['agreement']:.1%}"] if "agreement" in found else []),
        *size_lines(found),
    ]
    if compared is not None:
        name, difference, low, high = compared
        lines.append(f"accuracy minus {name}: {difference:+.1%}  95 % interval [{low:+.1%}, {high:+.1%}]")
    return lines, {"split": split, **found}


def evaluate_language_model(arguments: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The figures of a run of task code_lm: as lines, and as they are kept."""
    if arguments.split is not None:
        raise KdtrainError(
            "a language model has no test split, it is measured on its held-out rows; leave --split out"
        )
    from kdtrain.evaluation.code_lm import compare_language_runs, evaluate_language_run, measured_file

    if arguments.against not in (None, arguments.run):
        measured_file(arguments.against)  # errors come first: measuring takes time
    found = evaluate_language_run(arguments.run)
    low, high = found["loss_interval"]
    lines = [
        f"held-out rows, tokens    {found['rows']}, {found['tokens']}",
        f"loss (nats a token)      {found['loss']:.4f}  95 % interval [{low:.4f}, {high:.4f}]",
        f"perplexity               {found['perplexity']:.2f}",
    ]
    if "agreement" in found:
        lines.append(f"agreement with teacher   {found['agreement']:.1%}")
        lines.append(f"divergence from teacher  {found['divergence']:.4f}")
    lines += size_lines(found)
    lines.append(f"generates                {found['generated_per_second']:.1f} tokens/s (one text, float32)")
    if arguments.against is not None:
        difference, low, high = compare_language_runs(arguments.run, arguments.against)
        name = arguments.against.name
        lines.append(f"loss minus {name}: {difference:+.4f}  95 % interval [{low:+.4f}, {high:+.4f}]")
    return lines, found


def size_lines(found: dict[str, Any]) -> list[str]:
    """What a student of any task costs."""
    return [
        f"parameters               {found['parameters']:,}",
        f"size on disk             {human_bytes(found['bytes'])}",
        f"latency of one row       {found['latency_ms']:.2f} ms (median, float32)",
    ]
