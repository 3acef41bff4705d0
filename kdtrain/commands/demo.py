"""kdtrain demo."""

import argparse
import json
import shlex
from pathlib import Path

from kdtrain.console import add_output_options, result
from kdtrain.errors import KdtrainError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything has a default: `kdtrain demo` alone does the whole of it."""
    parser.add_argument(
        "--task",
        choices=("exceptions", "code-lm"),
        default="exceptions",
        help="classify exceptions, or distil a language model of code (default: %(default)s)",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="folder of the demo (default: runs/demo, or runs/demo-code-lm)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="task exceptions: students of each method (default: %(default)s)",
    )
    parser.add_argument(
        "--train-teacher",
        action="store_true",
        help="task exceptions: train a new teacher in place of the shipped one, about an hour on two cores",
    )
    parser.add_argument(
        "--site-packages",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="with --train-teacher: also learn from the packages installed in this folder (may be repeated)",
    )
    add_output_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the demo and print its report."""
    if arguments.task == "code-lm" and (arguments.seeds != 1 or arguments.train_teacher):
        raise KdtrainError(
            "--seeds and --train-teacher are for --task exceptions; leave them out with code-lm"
        )
    if arguments.seeds < 1:
        raise KdtrainError(f"--seeds must be at least 1, got {arguments.seeds}")
    if arguments.site_packages and not arguments.train_teacher:
        raise KdtrainError("--site-packages is what a new teacher learns from; add --train-teacher")
    if arguments.task == "code-lm":
        from kdtrain.demo.code_lm import language_demo

        output = Path(arguments.output or "runs/demo-code-lm")
        report, student = language_demo(output), output / "runs" / "forward_kl"
    else:
        from kdtrain.demo.classification import demo

        output = Path(arguments.output or "runs/demo")
        student = output / "runs" / "kd-0"
        report = demo(
            output,
            seeds=arguments.seeds,
            train_teacher=arguments.train_teacher,
            site_packages=arguments.site_packages,
        )
    result(arguments, f"{report}\n{next_commands(student)}", json.loads((output / "report.json").read_text()))
    return 0


def next_commands(student: Path) -> str:
    """Three commands to try next.

    Args:
        student: folder of a run of the demo.
    """
    run = shlex.quote(str(student))
    return "\n".join(
        (
            "Next:",
            f"  kdtrain evaluate {run}",
            f"  kdtrain doctor {run}/recipe.yaml",
            f"  kdtrain train {run}/recipe.yaml --method.temperature 4 --output {shlex.quote(f'{student}-again')}",
        )
    )
