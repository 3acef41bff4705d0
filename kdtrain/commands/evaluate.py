"""kdtrain evaluate RUN."""

import argparse
from pathlib import Path

from kdtrain.files import human_bytes, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run's folder, the split, and another run to compare with."""
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument(
        "--split", choices=("test", "valid"), default="test", help="rows to measure on (default: test)"
    )
    parser.add_argument(
        "--against", type=Path, metavar="RUN", help="another run: print the paired accuracy difference"
    )


def main(arguments: argparse.Namespace) -> int:
    """Measure the saved student anew, print the figures and keep them in evaluation.json."""
    from kdtrain.evaluate import compare_runs, evaluate_run

    found = evaluate_run(arguments.run, arguments.split)
    low, high = found["accuracy_interval"]
    print(f"rows                     {found['rows']}")
    print(f"accuracy                 {found['accuracy']:.4f}  95 % interval [{low:.4f}, {high:.4f}]")
    print(f"top-3 accuracy           {found['top3']:.4f}")
    print(f"macro F1                 {found['macro_f1']:.4f}")
    if "agreement" in found:
        print(f"agreement with teacher   {found['agreement']:.4f}")
    print(f"parameters               {found['parameters']:,}")
    print(f"size on disk             {human_bytes(found['bytes'])}")
    print(f"latency of one row       {found['latency_ms']:.2f} ms (median, float32)")
    if arguments.against is not None:
        difference, low, high = compare_runs(arguments.run, arguments.against, arguments.split)
        print(
            f"accuracy minus {arguments.against.name}: {difference:+.4f}  95 % interval [{low:+.4f}, {high:+.4f}]"
        )
    write_json(arguments.run / "evaluation.json", {"split": arguments.split, **found})
    return 0
