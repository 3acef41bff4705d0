"""kdtrain data exceptions."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command a data set."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="DATASET")
    exceptions = kinds.add_parser("exceptions", help="which exception type does a handler catch? 20 classes")
    exceptions.add_argument("--output", type=Path, required=True, help="folder to write")
    exceptions.add_argument(
        "trees",
        type=Path,
        nargs="*",
        metavar="FOLDER",
        help="trees of Python code; without any, what is installed here under a permissive licence",
    )


def main(arguments: argparse.Namespace) -> int:
    """Build the data set and print what it holds."""
    from kdtrain.data.exceptions import build_exceptions

    description = build_exceptions(arguments.output, arguments.trees)
    print(f"{arguments.output}: {description['rows']} from {description['files_read']} files")
    return 0
