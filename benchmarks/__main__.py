"""`python -m benchmarks`: measure and print; see benchmarks/README.md for the protocol."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.measure import environment
from benchmarks.operation import AnyCase
from benchmarks.registry import OPERATIONS, operation_of
from benchmarks.runner import MINIMUM_ROUNDS, ROOT, busy_cores, run_case
from benchmarks.suites import SUITES


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; everything has a default that fits a two-core machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--suite", choices=sorted(SUITES), default="cpu", help="which cases (default: %(default)s)"
    )
    parser.add_argument(
        "--case",
        action="append",
        metavar="TEXT",
        help="only cases whose name holds this text, such as 'jsd' or 'N=2048'; may be given again",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        choices=sorted({name for one in OPERATIONS.values() for name in one.contenders}),
        help="who takes part, of %(choices)s (default: all; one that cannot run says why)",
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="timed rounds of a case, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=7.0,
        help=f"stop adding rounds when a case's share of this is used, after {MINIMUM_ROUNDS} (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-tests", action="store_true", help="measure without running the tests of the operations first"
    )
    parser.add_argument(
        "--busy-cores",
        type=int,
        default=0,
        metavar="N",
        help="keep so many cores busy with other work meanwhile (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="also write <date>.csv and <date>.json there (<date>-<suite> for suites but cpu and gpu; -busy<N> with --busy-cores)",
    )
    chosen = parser.parse_args(arguments)
    if chosen.rounds < MINIMUM_ROUNDS:
        parser.error(f"--rounds must be at least {MINIMUM_ROUNDS}, got {chosen.rounds}")
    return chosen


def tests_pass(cases: list[AnyCase]) -> bool:
    """Run the tests of what is measured; a fast wrong loss has no place in a table."""
    files = list(dict.fromkeys(file for case in cases for file in operation_of(case).tests))
    print(f"tests: {' '.join(files)}", file=sys.stderr)
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files]
    # Triton's kernels are what is measured on a GPU and interpreted for minutes elsewhere.
    command += [] if cases[0].device == "cuda" else ["-k", "not triton"]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode == 0


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; the table goes to stdout, progress to stderr."""
    chosen = parse(arguments)
    suite, wanted = SUITES[chosen.suite], chosen.case
    cases = [case for case in suite if wanted is None or any(text in case.name for text in wanted)]
    if not cases:
        known = "; ".join(case.name for case in suite)
        print(
            f"No case of suite '{chosen.suite}' holds {wanted} in its name; it has {known}.", file=sys.stderr
        )
        return 2
    takes_part = {
        case.name: [name for name in operation_of(case).contenders if name in (chosen.contenders or [name])]
        for case in cases
    }
    cases = [case for case in cases if takes_part[case.name]]
    if not cases:
        print(
            f"None of the contenders {', '.join(chosen.contenders)} takes part in these cases of suite '{chosen.suite}'.",
            file=sys.stderr,
        )
        return 2

    device = cases[0].device
    if device == "cuda" and not torch.cuda.is_available():
        print(
            f"Suite '{chosen.suite}' needs a CUDA or ROCm GPU, and torch finds none; try --suite cpu.",
            file=sys.stderr,
        )
        return 2
    if chosen.out:
        # Now, and not when the first case has taken its minutes.
        try:
            chosen.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"--out {chosen.out} cannot be a folder: {error.strerror}.", file=sys.stderr)
            return 2
    stamp = environment(device)
    if chosen.busy_cores:
        stamp["busy_cores"] = chosen.busy_cores
    if not chosen.skip_tests and not tests_pass(cases):
        print("Tests of what is measured fail, so there are no figures.", file=sys.stderr)
        return 1
    print(", ".join(f"{name} {value}" for name, value in stamp.items()))
    # The suite of the machine's kind is what a date stands for; the others say their name.
    name = stamp["date"] if chosen.suite in ("cpu", "gpu") else f"{stamp['date']}-{chosen.suite}"
    if chosen.busy_cores:
        name += f"-busy{chosen.busy_cores}"
    everything: list[report.Record] = []
    start, failed = time.monotonic(), False
    for number, case in enumerate(cases, 1):

        def say(what: str, number: int = number) -> None:
            print(
                f"[{time.monotonic() - start:4.0f} s, case {number} of {len(cases)}] {what}", file=sys.stderr
            )

        share = (start + chosen.minutes * 60 - time.monotonic()) / (len(cases) - number + 1)
        try:
            with busy_cores(chosen.busy_cores):
                rows = run_case(case, takes_part[case.name], chosen.rounds, share, say)
            found = report.records(case, rows)
        except RuntimeError as error:  # of this case; the others have figures
            print(error, file=sys.stderr)
            failed = True
            continue
        everything += found
        print(f"\n{case.name}\n\n{report.markdown(found)}", flush=True)
        if chosen.out:
            report.write(chosen.out, name, stamp, everything)
    if chosen.out and everything:
        print(
            f"\nwritten: {', '.join(str(path) for path in report.write(chosen.out, name, stamp, everything))}"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
