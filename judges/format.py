"""Judges an answer by its form: named checks of how it begins, ends, and is marked up."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import ClassVar

from online_dpo.errors import JudgeError, nearest
from online_dpo.judging import Opinion, PointwiseJudge
from online_dpo.types import Candidate, Prompt

FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
LIST_ITEM = re.compile(r"^\s*(?:[-*+]|[0-9]{1,9}[.)])\s+\S", re.MULTILINE)
HEADING = re.compile(r"^ {0,3}#{1,6}\s+\S", re.MULTILINE)
SENTENCE_ENDS = ".!?…。！？"
CLOSING = "\"'”’»)]*_`"
ODD_SIGNS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")


class FormatJudge(PointwiseJudge):
    """The share, in [0, 1], of `checks` that hold; each check's outcome stands in the details.

    finished: the model ended by itself. sentence_start: the first letter or digit is no small letter. sentence_end:
    the last sign, but for closing quotes and brackets, ends a sentence, or a code block ends the answer.
    fences_closed: every code block is closed (CommonMark 0.31, section 4.5). bold_closed: outside code, "**" stands
    an even number of times. list, no_list, heading, no_heading: outside code, a line is, or none is, such a one in
    Markdown. clean: no control characters and no U+FFFD, which broken bytes become. An answer without text holds
    none of them.
    """

    cached: ClassVar[bool] = False

    def __init__(self, checks: Sequence[str] = ("finished", "sentence_end", "fences_closed", "bold_closed")) -> None:
        if not isinstance(checks, list | tuple) or not checks:
            raise JudgeError(f"FormatJudge: checks must be a list of names, found {checks!r:.60}")
        for name in checks:
            if name not in CHECKS:
                raise JudgeError(
                    f"FormatJudge: no check '{name}'{nearest(name, CHECKS) or '; known: ' + ', '.join(CHECKS)}"
                )
        self.checks = tuple(dict.fromkeys(checks))

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Opinion]:
        """One score per candidate, in [0, 1]."""
        return [self._opinion(candidate) for candidate in candidates]

    def _opinion(self, candidate: Candidate) -> Opinion:
        held = {name: bool(candidate.text.strip()) and CHECKS[name](candidate) for name in self.checks}
        return Opinion(sum(held.values()) / len(held), held)


def without_code(text: str) -> tuple[str, bool]:
    """The lines of `text` outside code blocks, and whether the last block was closed.

    A block ends at a fence of the same sign, at least as long, with nothing after it.
    """
    outside: list[str] = []
    fence = ""
    for line in text.splitlines():
        mark = FENCE.match(line)
        if not fence:
            if mark is None or (mark[1][0] == "`" and "`" in mark[2]):  # `` ```code``` `` within a line opens nothing
                outside.append(line)
            else:
                fence = mark[1]
        elif mark is not None and mark[1].startswith(fence) and not mark[2].strip():
            fence = ""
    return "\n".join(outside), not fence


def _sentence_start(candidate: Candidate) -> bool:
    first = next((sign for sign in candidate.text if sign.isalnum()), "")
    return not first.islower()


def _sentence_end(candidate: Candidate) -> bool:
    last = candidate.text.rstrip().splitlines()[-1]
    bare = last.rstrip(CLOSING + " ")
    ends_in_code = not bare and FENCE.match(last) is not None and without_code(candidate.text)[1]
    return ends_in_code or bare.endswith(tuple(SENTENCE_ENDS))


def _has(pattern: re.Pattern[str], candidate: Candidate) -> bool:
    return pattern.search(without_code(candidate.text)[0]) is not None


CHECKS: dict[str, Callable[[Candidate], bool]] = {
    "finished": lambda candidate: candidate.finish_reason == "stop",
    "sentence_start": _sentence_start,
    "sentence_end": _sentence_end,
    "fences_closed": lambda candidate: without_code(candidate.text)[1],
    "bold_closed": lambda candidate: without_code(candidate.text)[0].count("**") % 2 == 0,
    "list": lambda candidate: _has(LIST_ITEM, candidate),
    "no_list": lambda candidate: not _has(LIST_ITEM, candidate),
    "heading": lambda candidate: _has(HEADING, candidate),
    "no_heading": lambda candidate: not _has(HEADING, candidate),
    "clean": lambda candidate: ODD_SIGNS.search(candidate.text) is None,
}
