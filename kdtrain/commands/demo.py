"""kdtrain demo."""

import argparse
from pathlib import Path

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
        help="task exceptions: make the teacher anew in place of the shipped one, about an hour on two cores",
    )
    parser.add_argument(
        "--site-packages",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="with --train-teacher: also learn from the packages installed in this folder (may be repeated)",
    )


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

        print(language_demo(Path(arguments.output or "runs/demo-code-lm")))
        return 0
    from kdtrain.demo.classification import demo

    print(
        demo(
            Path(arguments.output or "runs/demo"),
            seeds=arguments.seeds,
            train_teacher=arguments.train_teacher,
            site_packages=arguments.site_packages,
        )
    )
    return 0
