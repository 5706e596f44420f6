"""Does faults to small real runs, one after another, and holds what comes out against a run that nobody disturbed.

    make faults
    make faults ARGS="driver --kills 5"
    python tests/faults/faults.py [KIND ...] [options]

Ends with `N injected, N survived, 0 lost`, and with status 1 where one was lost. What each kind does and compares
stands at the top of its module in kinds/.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

from ground import MODEL, Ground, Outcome

KINDS = ("driver", "actors", "server", "disk", "damage", "folder", "signals", "memory", "nan", "clock")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Ends the program with one line where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; none: all")
    parser.add_argument("--kills", type=int, default=50, help="kind driver: how often it is killed")
    parser.add_argument("--chain", type=int, default=5, help="kind driver: kills of one run before it may end")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default="", help="of a kind's injections, those whose name holds this")
    parser.add_argument("--model", type=Path, default=MODEL, help="a small model's folder")
    parser.add_argument(
        "--address",
        help="host:port of a Ray that is up: its start is spared; kinds driver, folder, damage, signals, nan",
    )
    parser.add_argument("--work", type=Path, help="keep all runs in this folder (default: a temporary one)")
    options = parser.parse_args(arguments)
    unknown = [kind for kind in options.kinds if kind not in KINDS]
    if unknown:
        parser.error(f"no kind '{unknown[0]}'; there are {', '.join(KINDS)}")
    if not sys.platform.startswith("linux"):
        parser.error("faults are done by Linux's means")
    if not (options.model / "model.safetensors").is_file():
        parser.error(f"no model at {options.model}: name a small one with --model")
    return options


def run(options: argparse.Namespace, work: Path) -> list[Outcome]:
    """Do the faults, say each as it is done, and return them."""
    ground = Ground(work, options.model, options)
    outcomes: list[Outcome] = []
    for kind in options.kinds or KINDS:
        for outcome in importlib.import_module(f"kinds.{kind}").inject(ground):
            outcomes.append(outcome)
            state = "survived" if outcome.survived else "LOST"
            print(f"{state:8} {kind}: {outcome.what}: {outcome.seen}", flush=True)
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where an injection was lost."""
    options = parse(arguments)
    began = time.monotonic()
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        outcomes = run(options, options.work.resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="online-dpo-faults-") as folder:
            outcomes = run(options, Path(folder))
    survived = sum(outcome.survived for outcome in outcomes)
    print(f"{time.monotonic() - began:.0f} seconds")
    print(f"{len(outcomes)} injected, {survived} survived, {len(outcomes) - survived} lost")
    return int(survived < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
