"""Where an answer states its result, and the number that stands there.

Numbers are exact fractions: 0.1 + 0.2 is 0.3 here, and no tolerance hides a wrong digit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

SPACES = "\u00a0\u2009\u202f"
CURRENCY = "$€£¥₹"
LONGEST = 300
"""Signs of a number at most: longer ones are noise, and Python refuses to read the longest."""
LONGEST_EXPONENT = 5
"""Signs, as in e-999: the value of e999999 would fill a megabyte."""

_DIGITS = rf"(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+(?![0-9])|[0-9]{{1,3}}(?:[{SPACES}][0-9]{{3}})+(?![0-9])|[0-9]+)"
NUMBER = re.compile(
    rf"(?<![A-Za-z0-9_])(?<![0-9]\.)"
    rf"(?P<sign>(?<![0-9A-Za-z)\].])[-+])?[{CURRENCY}]?(?P<inner>(?<=[{CURRENCY}])-)?"
    rf"(?:(?P<whole>{_DIGITS})(?:(?P<decimals>\.[0-9]+)(?P<e1>[eE][-+]?[0-9]+(?![0-9A-Za-z]))?"
    rf"|(?P<e2>[eE][-+]?[0-9]+(?![0-9A-Za-z]))"
    rf"|/(?P<under>[0-9]+)(?![0-9/])|[ ](?P<part>[0-9]+)/(?P<part_under>[0-9]+)(?![0-9/]))?"
    rf"|(?P<bare>(?<!\.)\.[0-9]+))"
    rf"(?P<percent>[ ]?%)?"
)
LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}"), r"\1/\2"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"([0-9])(?:\{,\}|\\,|\\!,|,\\!)(?=[0-9]{3})"), r"\1,"),
    (re.compile("\u2212"), "-"),  # the true minus sign
)
HASHES = "####"
HEADING = re.compile(r"[.):]\s*[^\W\d_]")
BOX = re.compile(r"\\boxed\s*\{")
SAYS = re.compile(r"\banswer(?:\s+is|\s*:)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Number:
    """A number as written: `value` without regard to a percent sign, and whether there was one."""

    value: Fraction
    percent: bool = False

    def equals(self, other: Number, tolerance: Fraction = Fraction(0)) -> bool:
        """Whether the two differ by at most `tolerance`.

        Where one alone has a percent sign it may be a unit (50 % for 50) or a factor (50 % for 0.5): both will do.
        """
        if abs(self.value - other.value) <= tolerance:
            return True
        if self.percent == other.percent:
            return False
        one, two = (number.value / 100 if number.percent else number.value for number in (self, other))
        return abs(one - two) <= tolerance


def numbers(text: str) -> list[Number]:
    """The numbers of `text`, in order: 1,234.5 · −3 · $5 · 20% · 3/4 · 1 1/2 · 1e-3 · \\frac{3}{4}.

    A hyphen after a digit, letter or closing bracket is no sign (5-3, COVID-19). Words ("three", "million") are not
    read, nor a fraction over 0.
    """
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    found = (_number(match) for match in NUMBER.finditer(text))
    return [number for number in found if number is not None]


def final_number(text: str) -> Number | None:
    """The number that `text` gives as its result; None where it has none.

    The first of these that has a number: after the last "####" ("#### Step 1" and "#### 1. Sum" are headings); the last
    one in the last \\boxed{}; the first one in the rest of the line after the last "answer is" or "answer:"; the
    last of the whole text.
    """
    for part in reversed(text.split(HASHES)[1:]):
        match = NUMBER.match(start := _plain_start(part))
        if match and not HEADING.match(start, match.end()) and (number := _number(match)):
            return number
    for box in reversed(boxes(text)):
        if found := numbers(box):
            return found[-1]
    for said in reversed(SAYS.split(text)[1:]):
        if found := numbers(_line_after(said, 0)):
            return found[0]
    found = numbers(text)
    return found[-1] if found else None


def final_text(text: str) -> str:
    """What `text` gives as its result: after the last "####", in the last \\boxed{}, after "answer is"; else all."""
    if HASHES in text:
        after = _line_after(text, text.rindex(HASHES) + len(HASHES))
        if after.strip():
            return after
    if found := boxes(text):
        return found[-1]
    said = list(SAYS.finditer(text))
    after = _line_after(text, said[-1].end()) if said else ""
    return after if after.strip(" .:*") else text


def boxes(text: str) -> list[str]:
    """The contents of each \\boxed{…} of `text` that is closed, braces inside counted; outer ones alone."""
    found: list[str] = []
    match = BOX.search(text)
    while match:
        depth, place = 1, match.end()
        while place < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            place += 1
        if depth:  # never closed: cut off, and so is all that follows it
            break
        found.append(text[match.end() : place - 1])
        match = BOX.search(text, place)
    return found


def _line_after(text: str, place: int) -> str:
    end = text.find("\n", place)
    return text[place:] if end < 0 else text[place:end]


def _plain_start(part: str) -> str:
    """The first line of `part` as `numbers` reads it, without white space and emphasis before it."""
    line = _line_after(part, 0).lstrip(" \t*_:")
    for pattern, plain in LATEX:
        line = pattern.sub(plain, line)
    return line


def _number(match: re.Match[str]) -> Number | None:
    part = match.groupdict(default="")
    exponent = part["e1"] or part["e2"]
    if len(match[0]) > LONGEST or len(exponent) > LONGEST_EXPONENT:
        return None
    whole = re.sub(rf"[,{SPACES}]", "", part["whole"])
    over, under = part["part"], part["under"] or part["part_under"]
    if under and not int(under):
        return None
    value = Fraction(f"{whole or '0'}{part['decimals'] or part['bare']}{exponent}")
    if over:
        value += Fraction(int(over), int(under))
    elif under:
        value /= int(under)
    negative = (part["sign"] == "-") != bool(part["inner"])
    return Number(-value if negative else value, bool(part["percent"]))
