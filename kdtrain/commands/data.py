"""kdtrain data: build or convert data sets."""

import argparse
from pathlib import Path
from typing import Any

from kdtrain.console import add_output_options, result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command a data set."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="DATASET")
    exceptions = _kind(
        kinds,
        "exceptions",
        "exception classification in Python, from any code: which of 20 types does a handler catch?",
        "Splits by module; near duplicates are removed.",
    )
    exceptions.add_argument(
        "trees",
        type=Path,
        nargs="*",
        metavar="FOLDER",
        help="trees of Python code; without any, what is installed here under a permissive licence",
    )
    devign = _kind(
        kinds,
        "devign",
        "defect detection in C, from CodeXGLUE's files",
        "The folder holds function.json with train.txt, valid.txt and test.txt, or train.jsonl, valid.jsonl and test.jsonl "
        "with `func` and `target`; .xz and .gz are read too.",
    )
    clones = _kind(
        kinds,
        "bigclonebench",
        "clone detection in Java, from CodeXGLUE's files",
        "The folder holds data.jsonl with `idx` and `func`, and train.txt, valid.txt and test.txt with two ids and a label a "
        "line; .xz and .gz are read too.",
    )
    cubert = _kind(
        kinds,
        "cubert",
        "exception classification in Python, from CuBERT's files",
        "The folder holds JSON lines with `function` and `label`, any number of files a split; .xz and .gz are read too.",
    )
    for kind in (devign, clones, cubert):
        kind.add_argument("source", type=Path, metavar="FOLDER", help="where the downloaded files lie")
    for kind in (devign, clones):
        kind.add_argument(
            "--keep-whitespace", action="store_true", help="keep line breaks and indentation as they are"
        )
    clones.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="keep this part of train and valid; the study kept 0.1 (default: 1)",
    )
    for kind in (exceptions, devign, clones, cubert):
        kind.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to write")
        add_output_options(kind)


def _kind(kinds: Any, name: str, summary: str, more: str) -> argparse.ArgumentParser:
    return kinds.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {more}")


def main(arguments: argparse.Namespace) -> int:
    """Build the data set and print what it holds."""
    output = arguments.output
    if arguments.kind == "exceptions":
        from kdtrain.data.exceptions import build_exceptions

        description = build_exceptions(output, arguments.trees)
        text = f"{output}: {description['rows']} from {description['files_read']} files"
        result(arguments, text, description)
        return 0
    from kdtrain.data.benchmarks import convert_bigclonebench, convert_cubert, convert_devign

    if arguments.kind == "devign":
        description = convert_devign(arguments.source, output, keep_whitespace=arguments.keep_whitespace)
    elif arguments.kind == "bigclonebench":
        description = convert_bigclonebench(
            arguments.source, output, keep_whitespace=arguments.keep_whitespace, share=arguments.share
        )
    else:
        description = convert_cubert(arguments.source, output)
    text = f"{output}: {description['rows']}, labels of the test split {description['labels']['test']}"
    result(arguments, text, description)
    return 0
