"""Every error the user can cause or must act on, as one tree.

::

    OnlineDPOError                 anything that ends in one clear line
    ├── ConfigError                the experiment (YAML, --set) is wrong          exit 2
    ├── DataError                  a prompt file or dataset is wrong              exit 2
    ├── ModelError                 a model cannot be found or loaded              exit 2
    ├── JudgeError                 a judge cannot be loaded or broke its contract exit 2
    ├── RunFolderError             a run folder is missing, locked or damaged     exit 2
    ├── EngineError                the engine failed or holds the wrong weights   exit 1
    ├── LearnerError               the learner's workers cannot go on             exit 1
    ├── TrainingError              non-finite loss, broken first-step identity    exit 1
    ├── DiskFullError              there is no room for a file                    exit 1
    └── LeftTraining               training was told to leave; its state is kept  exit 143
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from online_dpo.keys import without_keys


class OnlineDPOError(Exception):
    """Base of all errors that the command line prints as one line (no traceback)."""

    exit_code = 1
    process_ended = False
    """Whether a process that the run had started ended: anew, it may go well."""


class ConfigError(OnlineDPOError):
    """The experiment is wrong: unknown key, wrong type, impossible combination."""

    exit_code = 2


class DataError(OnlineDPOError):
    """A prompt file or dataset cannot be read, or lacks what the experiment asks of it."""

    exit_code = 2


class ModelError(OnlineDPOError):
    """A model name resolves to nothing loadable on this machine."""

    exit_code = 2


class JudgeError(OnlineDPOError):
    """A judge cannot be loaded, or broke its contract (wrong number of scores, too many abstentions)."""

    exit_code = 2


class RunFolderError(OnlineDPOError):
    """A run folder is missing, in use, damaged, or belongs to another experiment."""

    exit_code = 2


class EngineError(OnlineDPOError):
    """The engine failed, or does not hold the weights that it should hold."""


class LearnerError(OnlineDPOError):
    """The learner's workers cannot go on: a process ended, or failed while the others wait for it."""


class TrainingError(OnlineDPOError):
    """Training cannot go on: a non-finite loss or gradient, or a broken first-step identity."""


class DiskFullError(OnlineDPOError):
    """A file cannot be written, for want of room."""


class LeftTraining(OnlineDPOError):
    """The learner was told to leave and kept its state first: resumed, the round goes on from there."""

    exit_code = 143


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known word nearest to `word`; empty when none is near."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def one_line(error: BaseException, limit: int = 200) -> str:
    """An exception as "Type: message" on one line of at most `limit` characters, without keys that it repeats."""
    message = " ".join(without_keys(str(error)).split())
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
