"""kdtrain evaluate RUN."""

import argparse
from pathlib import Path
from typing import Any

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


def main(arguments: argparse.Namespace) -> int:
    """Measure the saved student anew, print the figures and keep them in evaluation.json."""
    path = arguments.run / "recipe.yaml"
    if path.is_file() and read_yaml(path).get("task") == "code_lm":
        found = evaluate_language_model(arguments)
    else:
        found = evaluate_classifier(arguments)
    write_json(arguments.run / "evaluation.json", found)
    return 0


def evaluate_classifier(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run of task classification."""
    from kdtrain.evaluation.classification import compare_runs, evaluate_run

    split = arguments.split or "test"
    compared = None  # told first: measuring takes its time
    if arguments.against is not None:
        compared = arguments.against.name, *compare_runs(arguments.run, arguments.against, split)
    found = evaluate_run(arguments.run, split)
    low, high = found["accuracy_interval"]
    print(f"rows                     {found['rows']}")
    print(f"accuracy                 {found['accuracy']:.4f}  95 % interval [{low:.4f}, {high:.4f}]")
    print(f"top-3 accuracy           {found['top3']:.4f}")
    print(f"macro F1                 {found['macro_f1']:.4f}")
    if "agreement" in found:
        print(f"agreement with teacher   {found['agreement']:.4f}")
    print_size(found)
    if compared is not None:
        name, difference, low, high = compared
        print(f"accuracy minus {name}: {difference:+.4f}  95 % interval [{low:+.4f}, {high:+.4f}]")
    return {"split": split, **found}


def evaluate_language_model(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run of task code_lm."""
    if arguments.split is not None:
        raise KdtrainError(
            "a language model has no test split, it is measured on its held-out rows; leave --split out"
        )
    from kdtrain.evaluation.code_lm import compare_language_runs, evaluate_language_run, measured_file

    if arguments.against not in (None, arguments.run):
        measured_file(arguments.against)  # told first: measuring takes its time
    found = evaluate_language_run(arguments.run)
    low, high = found["loss_interval"]
    print(f"held-out rows, tokens    {found['rows']}, {found['tokens']}")
    print(f"loss (nats a token)      {found['loss']:.4f}  95 % interval [{low:.4f}, {high:.4f}]")
    print(f"perplexity               {found['perplexity']:.2f}")
    if "agreement" in found:
        print(f"agreement with teacher   {found['agreement']:.4f}")
        print(f"divergence from teacher  {found['divergence']:.4f}")
    print_size(found)
    print(f"generates                {found['generated_per_second']:.1f} tokens/s (one text, float32)")
    if arguments.against is not None:
        difference, low, high = compare_language_runs(arguments.run, arguments.against)
        print(
            f"loss minus {arguments.against.name}: {difference:+.4f}  95 % interval [{low:+.4f}, {high:+.4f}]"
        )
    return found


def print_size(found: dict[str, Any]) -> None:
    """What a student of any task costs."""
    print(f"parameters               {found['parameters']:,}")
    print(f"size on disk             {human_bytes(found['bytes'])}")
    print(f"latency of one row       {found['latency_ms']:.2f} ms (median, float32)")
