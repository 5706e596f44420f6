"""Gives the program every bad input, and holds that each ends in one clear line with nothing lost.

    make bad-input
    make bad-input ARGS="yaml prompts --show"
    python tests/bad_input/bad_input.py [KIND ...] [options]

Ends with `N inputs, N one-line errors, 0 tracebacks`, and with status 1 where an input did not end as it should. Inputs
that are odd but right (text from right to left, a byte order mark) must go on; they are counted apart.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import command_cases
import dataset_cases
import gpu_cases
import judge_cases
import lora_cases
import model_cases
import prompt_cases
import random_cases
import run_folder_cases
import tokenizer_cases
import yaml_cases
from case import Case
from runner import SECONDS, Outcome, in_subprocess, run_case

MODULES = (
    yaml_cases,
    command_cases,
    prompt_cases,
    model_cases,
    lora_cases,
    tokenizer_cases,
    dataset_cases,
    judge_cases,
    gpu_cases,
    run_folder_cases,
    random_cases,
)
IN_A_PROCESS = 40
"""One case of so many is run a second time, in a process of its own, where nothing is changed `around` it."""


def cases(kinds: Iterable[str] = (), only: str = "") -> Iterator[Case]:
    """The cases of `kinds` (none: of all) whose name holds `only`."""
    wanted = set(kinds)
    for module in MODULES:
        yield from (case for case in module.CASES if (not wanted or case.kind in wanted) and only in case.name)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Ends the program with one line where it is wrong."""
    known = sorted({case.kind for case in cases()})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(known)}; none: all")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--show", action="store_true", help="print the line with which each ended")
    parser.add_argument("--in-a-process", type=int, default=IN_A_PROCESS, metavar="N", help="one case of N; 0: none")
    options = parser.parse_args(arguments)
    unknown = [kind for kind in options.kinds if kind not in known]
    if unknown:
        parser.error(f"no kind '{unknown[0]}'; there are {', '.join(known)}")
    return options


def outcomes(options: argparse.Namespace) -> Iterator[Outcome]:
    """Run the chosen cases, some of them twice; each is counted once."""
    for number, case in enumerate(cases(options.kinds, options.only)):
        faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # one that hangs is a fault, and says where
        outcome = run_case(case)
        if options.in_a_process and number % options.in_a_process == 0 and case.around is nullcontext:
            again = run_case(case, in_subprocess)
            outcome = again if again.faults and not outcome.faults else outcome
        gc.freeze()  # what is left are modules: looking through them after each case takes longer than the case
        yield outcome
    faulthandler.cancel_dump_traceback_later()
    gc.unfreeze()  # libraries count what is left at the end, and would say so below the last line


def say(outcome: Outcome, show: bool) -> None:
    """What was wrong, and with `show` what the user read."""
    if show:
        print(f"{outcome.case.name}\n    {outcome.line}", flush=True)
    for fault in outcome.faults:
        print(f"FAULT {outcome.case.name}: {fault}\n      {outcome.line}", flush=True)


def sum_up(found: list[Outcome]) -> None:
    """Kinds and their counts, and the last line."""
    for kind in dict.fromkeys(outcome.case.kind for outcome in found):
        of_kind = [outcome for outcome in found if outcome.case.kind == kind]
        good = sum(not outcome.faults for outcome in of_kind)
        print(f"{kind:12} {len(of_kind):5} inputs, {good} ended as they should")
    refused = [outcome for outcome in found if not outcome.went_on]
    print(f"{len(found) - len(refused)} odd inputs went on")
    lines = sum(not outcome.faults for outcome in refused)
    traces = sum(outcome.traced for outcome in found)
    print(f"{len(refused)} inputs, {lines} one-line errors, {traces} tracebacks")


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where an input did not end as it should."""
    options = parse(arguments)
    began, found = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="bad-input-cache-") as cache:
        os.environ["HF_DATASETS_CACHE"] = cache  # the user's own would keep a copy of every bad file
        for outcome in outcomes(options):
            say(outcome, options.show)
            found.append(outcome)
    print(f"{time.monotonic() - began:.0f} seconds")
    sum_up(found)
    return int(any(outcome.faults for outcome in found))


if __name__ == "__main__":
    sys.exit(main())
