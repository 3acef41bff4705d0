"""kdtrain demo."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything has a default: `kdtrain demo` alone does the whole of it."""
    parser.add_argument(
        "--task",
        choices=("exceptions", "code-lm"),
        default="exceptions",
        help="classify exceptions, or distil a language model of code (default: %(default)s)",
    )
    parser.add_argument("--output", help="folder of the demo (default: runs/demo, or runs/demo-code-lm)")
    parser.add_argument("--seeds", type=int, default=1, help="students of each method (default: %(default)s)")
    parser.add_argument(
        "--train-teacher", action="store_true", help="make the teacher anew, about an hour on two cores"
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
    if arguments.task == "code-lm":
        from kdtrain.language.demo import language_demo

        print(language_demo(Path(arguments.output or "runs/demo-code-lm")))
        return 0
    from kdtrain.demo import demo

    print(
        demo(
            Path(arguments.output or "runs/demo"),
            seeds=arguments.seeds,
            train_teacher=arguments.train_teacher,
            site_packages=arguments.site_packages,
        )
    )
    return 0
