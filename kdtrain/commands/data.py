"""kdtrain data: build or convert data sets."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command a data set."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="DATASET")
    exceptions = kinds.add_parser("exceptions", help="which exception type does a handler catch? 20 classes")
    exceptions.add_argument(
        "trees",
        type=Path,
        nargs="*",
        metavar="FOLDER",
        help="trees of Python code; without any, what is installed here under a permissive licence",
    )
    devign = kinds.add_parser("devign", help="defect detection in C, from CodeXGLUE's files")
    clones = kinds.add_parser("bigclonebench", help="clone detection in Java, from CodeXGLUE's files")
    cubert = kinds.add_parser("cubert", help="exception classification, from CuBERT's files")
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
        kind.add_argument("--output", type=Path, required=True, help="folder to write")


def main(arguments: argparse.Namespace) -> int:
    """Build the data set and print what it holds."""
    output = arguments.output
    if arguments.kind == "exceptions":
        from kdtrain.data.exceptions import build_exceptions

        description = build_exceptions(output, arguments.trees)
        print(f"{output}: {description['rows']} from {description['files_read']} files")
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
    print(f"{output}: {description['rows']}, labels of the test split {description['labels']['test']}")
    return 0
