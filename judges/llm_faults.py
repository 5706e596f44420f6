"""What can go wrong between a judge and its server, and what each thing means: wait, abstain, or end the run."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from online_dpo.errors import JudgeError, one_line

if TYPE_CHECKING:
    import openai

BUSY = (408, 409, 425, 429)
"""Statuses after which the same request may do better; so may it after any from 500 on, but for 501."""
ABOUT_THE_PROMPT = (400, 413, 422)
ABOUT_THE_SETTINGS = ("unsupported_parameter", "unsupported_value", "unknown_parameter", "invalid_api_key")
WHOLE = 1_000_000
"""A message is cut only after secrets are out of it."""
OUT_OF_MONEY = "insufficient_quota"
WORD = re.compile(r"[A-Za-z][A-Za-z_]{2,40}")


class NoAnswerError(Exception):
    """This request has no answer: the judge abstains with `reason`. `passing`: another time it may have one."""

    def __init__(self, reason: str, *, passing: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.passing = passing


class RefusedError(NoAnswerError):
    """The server took the request for wrong in itself, such as too long."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure that may pass. `server`: it is the server's (away, overloaded), not this request's (slow, cut off)."""

    server: bool
    said: str
    retry_after: float | None = None
    """How long the server asks to be left alone, in seconds."""


def fault_of(error: openai.APIError) -> Fault:
    """What `error` means. Raises `RefusedError` for this request alone, `JudgeError` for what fails every time."""
    import openai

    if isinstance(error, openai.APITimeoutError) and type(error.__cause__).__name__ != "ConnectTimeout":
        return Fault(server=False, said="no answer within the time limit")
    if isinstance(error, openai.APIConnectionError):
        return Fault(server=True, said=one_line(error.__cause__ or error, WHOLE))
    if not isinstance(error, openai.APIStatusError):
        return Fault(server=False, said="the reply has no valid form")
    status, said = error.status_code, f"status {error.status_code}, {one_line(error, WHOLE)}"
    if error.code == OUT_OF_MONEY:
        raise JudgeError(said)
    if status in BUSY or (status >= 500 and status != 501):
        return Fault(server=True, said=said, retry_after=retry_after(error.response.headers))
    if status in ABOUT_THE_PROMPT and error.code not in ABOUT_THE_SETTINGS:
        raise RefusedError(f"the server refused the request{_why(error)}", passing=False)
    raise JudgeError(said)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The header Retry-After in seconds, from a number or a date; None without one (RFC 9110, section 10.2.3)."""
    value = headers.get("retry-after")
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _why(error: openai.APIStatusError) -> str:
    """The server's own word for it, where it is one word: reasons are counted, so a sentence would not do."""
    words = [word for word in (error.code, error.param, error.type) if isinstance(word, str) and WORD.fullmatch(word)]
    return f" ({words[0]})" if words else f" (status {error.status_code})"
