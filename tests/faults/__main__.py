"""Every fault of every scenario: `python -m tests.faults`, or `make faults`. Prints a table and every failure.

python -m tests.faults --every 10 --scenario "cache classifier"     every tenth trial of one scenario
python -m tests.faults --table docs/faults.md                       keep the table
"""

import argparse
import datetime
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.faults.scenarios import SCENARIOS, prepare
from tests.faults.trials import SURVIVED, Fault, Table, all_trials, reference, trial

FAULTS: tuple[Fault, ...] = ("kill", "full disk", "flip", "truncate", "remove", "empty")


def main() -> int:
    """Run the trials; code 1 when one failed."""
    parser = argparse.ArgumentParser(description="Inject faults into tiny runs of real commands.")
    parser.add_argument("--scenario", action="append", help="name of a scenario (default: all)")
    parser.add_argument("--every", type=int, default=1, help="run every n-th trial only (default: all)")
    parser.add_argument("--table", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="kdtrain-faults-"))
    table, started = Table(), time.monotonic()
    try:
        prepare(folder / "shared")
        for scenario in SCENARIOS:
            if options.scenario and scenario.name not in options.scenario:
                continue
            made = reference(scenario, folder / "shared", folder)
            trials = list(all_trials(made))[:: options.every]
            for number, (fault, at) in enumerate(trials):
                verdict, text = trial(made, folder / "trial", fault, at, seed=number)
                table.add(fault, verdict, f"{verdict}: {text}")
                if verdict not in SURVIVED:
                    print(f"\n{verdict}: {text}", flush=True)
                shutil.rmtree(folder / "trial", ignore_errors=True)
                if sys.stderr.isatty():
                    print(f"\r{scenario.name}: {number + 1}/{len(trials)}", end="", file=sys.stderr)
            print(f"{scenario.name}: {len(trials)} trials, {made.operations} file operations", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = as_markdown(table, time.monotonic() - started, options.every)
    print("\n" + lines)
    if options.table is not None:
        options.table.write_text(lines)
    return 1 if table.failures else 0


def as_markdown(table: Table, seconds: float, every: int) -> str:
    """Tried, survived and failed for each fault."""
    lines = [
        "# Faults injected",
        "",
        f"{datetime.date.today()}, {platform.machine()} CPU, torch {torch.__version__}, {seconds / 60:.0f} min, "
        f"{'every trial' if every == 1 else f'every {every}th trial'}: `python -m tests.faults`.",
        "",
        "| fault | tried | same bytes after a second run | refused in a sentence | silent | traceback | hang | leftovers |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for fault in FAULTS:
        counts = [table.counts[fault, verdict] for verdict in ("same bytes", "refused", "silent", "traceback", "hang", "leftovers")]  # fmt: skip
        lines.append(f"| {fault} | {sum(counts)} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
