"""One bad input."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One input and what must be said of it.

    `arrange` writes what it needs into an empty folder and gives the command line, without the program's name; it is
    run there. `says` is a regular expression that the one line on standard error must match: what is wrong, where, and
    the nearest right thing where there is one. `exit_code`: None for any but 0. With `goes_on` the input is odd but
    right: the command must succeed, and `says` match what it prints. With `may_go_on` the input is random: either way
    is right. With `begun` the fault shows only once a run is at work: its folder stays, to be resumed. `around` is what
    the command is run in.
    """

    name: str
    arrange: Callable[[Path], list[str]]
    says: str
    exit_code: int | None = None
    goes_on: bool = False
    may_go_on: bool = False
    begun: bool = False
    around: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def kind(self) -> str:
        """What its name begins with, before the colon."""
        return self.name.partition(":")[0]
