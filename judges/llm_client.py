"""One server with the OpenAI chat interface: asking it, and waiting for it where it is away."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from judges.llm_faults import Fault, NoAnswerError, fault_of
from judges.llm_meter import Meter, Prices
from judges.llm_prompts import Chat
from judges.llm_reply import Reply, parse_reply
from online_dpo.errors import JudgeError, nearest

if TYPE_CHECKING:
    import openai

log = logging.getLogger(__name__)
OFFICIAL = "https://api.openai.com/v1"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0
BETWEEN_WARNINGS_S = 60.0
SHOWN = 300
"""Characters of a server's message that an error shows."""
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where a model is, and how it is asked. See `LLMBase` for the keys."""

    model: str
    base_url: str | None = None
    api_key_env: str | None = None
    temperature: float | None = 0.0
    seed: int | None = None
    token_limit: str = "max_tokens"  # noqa: S105 # a key's name, no secret
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 60.0
    retries: int = 2
    patience_s: float = 300.0
    prices: Prices = field(default_factory=Prices)

    def address(self) -> str:
        """The URL; `JudgeError` where it is none, or holds a secret."""
        url = self.base_url or os.environ.get("OPENAI_BASE_URL") or OFFICIAL
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JudgeError(f"base_url must look like http://host:port/v1, found '{url[:100]}'")
        if parts.username or parts.password or parts.query:
            raise JudgeError("base_url must hold no user, password or query: a key belongs into the environment")
        return url

    @property
    def variable(self) -> str:
        """How messages call the key's variable: not by a name that may be the key itself, put there by mistake."""
        name = self.api_key_env or "OPENAI_API_KEY"
        return name if name.isupper() else "that api_key_env names"

    def key(self) -> str | None:
        """The key from the environment; None where there is none and none is needed."""
        name = self.variable
        key = os.environ.get(self.api_key_env or "OPENAI_API_KEY", "").strip()
        if not key and (self.api_key_env or self.address() == OFFICIAL):
            raise JudgeError(f"the environment variable {name} (api_key_env) holds no key")
        if key and not (key.isascii() and key.isprintable()):
            raise JudgeError(f"the key in the environment variable {name} has characters that no header can hold")
        return key or None


class ChatClient:
    """Asks `server`. Thread-safe; the connection is made at the first request."""

    def __init__(self, server: Server) -> None:
        """`JudgeError` for an impossible address or a missing key; the server itself is not asked yet."""
        if importlib.util.find_spec("openai") is None:
            raise JudgeError("the package 'openai' is not installed")
        self.server = server
        self.url = server.address()
        self.meter = Meter()
        self._key = server.key()
        self._lock = threading.Lock()
        self._openai: openai.OpenAI | None = None
        self._silent_until = 0.0

    def ask(self, chat: Chat, *, max_tokens: int, top_logprobs: int | None = None) -> Reply:
        """The model's reply; it is counted by the meter.

        What may pass is asked again. A server that is away, overloaded or failing is waited for `patience_s` in all,
        with growing, random pauses, or as long as it says itself (Retry-After); then `JudgeError`: later requests
        would fare no better. A reply that takes longer than `timeout_s`, or is none, is asked for `retries` more
        times; then `NoAnswerError`, passing: it may be this prompt's fault. `RefusedError` where the server says so.
        """
        body = self._body(chat, max_tokens, top_logprobs)
        began, failures, faults = 0.0, 0, 0
        while True:
            reply = self._try(body)
            if isinstance(reply, Reply):
                self.meter.add({"calls": 1, **self.amounts(reply)})
                return reply
            began = began or time.monotonic()
            failures += 1
            faults += not reply.server
            if faults > self.server.retries:
                raise NoAnswerError(reply.said, passing=True)
            self._wait(reply, failures, time.monotonic() - began)
            self.meter.add({"retries": 1})

    def amounts(self, reply: Reply) -> dict[str, float]:
        """What `reply` cost, as the ledger has it; `JudgeError` where there are prices and no count."""
        try:
            return self.server.prices.amounts(reply)
        except JudgeError as error:
            raise self._final(str(error)) from error

    def _body(self, chat: Chat, max_tokens: int, top_logprobs: int | None) -> dict[str, Any]:
        server = self.server
        body: dict[str, Any] = {"model": server.model, "messages": chat, server.token_limit: max_tokens}
        if server.temperature is not None:
            body["temperature"] = server.temperature
        if server.seed is not None:
            body["seed"] = server.seed
        if top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        return body

    def _try(self, body: dict[str, Any]) -> Reply | Fault:
        """One request. What the client says is not chained to errors: a server may repeat the key in it."""
        import openai

        completions = self._client().chat.completions.with_raw_response
        try:
            raw = completions.create(**body, extra_body=dict(self.server.extra_body))
        except openai.NotFoundError:
            raise self._final(f"status 404{self._nearest_model()}") from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            name = self.server.variable
            what = f"the key in {name} is refused" if self._key else f"it wants a key, and {name} holds none"
            raise self._final(f"status {error.status_code}: {what}") from None
        except openai.APIError as error:
            try:
                return fault_of(error)
            except JudgeError as final:
                raise self._final(str(final)) from None
        return parse_reply(raw.text) or Fault(server=False, said="the reply has no valid form")

    def _wait(self, fault: Fault, failures: int, waited: float) -> None:
        """Sleep until the next try; `JudgeError` when that would be more than the patience."""
        growing = min(FIRST_WAIT_S * 2.0 ** min(failures - 1, 30), LONGEST_WAIT_S)
        # Random, and never before the server asked for: not all threads at once.
        pause = growing * random.uniform(0.5, 1.0)
        if fault.retry_after is not None:
            least = max(fault.retry_after, FIRST_WAIT_S)
            pause = least * random.uniform(1.0, 1.0 + min(0.25, 1.0 / least))
        if fault.server and waited + pause > self.server.patience_s:
            asked = f"; it asks for {fault.retry_after:g} s" if fault.retry_after else ""
            raise self._final(
                f"{fault.said}; waited for {waited:.0f} s of patience_s {self.server.patience_s:g}{asked}; "
                "what was answered is kept: run again when the server answers"
            )
        if fault.server and time.monotonic() > self._silent_until:
            self._silent_until = time.monotonic() + BETWEEN_WARNINGS_S
            log.warning("%s", self._clean(f"{self.url}: {fault.said}; trying again for {self.server.patience_s:g} s"))
        time.sleep(pause)

    def _client(self) -> openai.OpenAI:
        with self._lock:
            if self._openai is None:
                import openai

                self._openai = openai.OpenAI(
                    base_url=self.url,
                    api_key=self._key or "none",  # the client insists on one, a server without keys ignores it
                    timeout=self.server.timeout_s,
                    max_retries=0,  # it would count tries, not time, and treat a slow request as a server that is away
                )
            return self._openai

    def _nearest_model(self) -> str:
        """What a 404 means: the model is not among the server's, or the address is not right."""
        import openai

        try:
            served = [str(model.id) for model in self._client().models.list()]
        except (openai.OpenAIError, ValueError, TypeError, AttributeError):  # the list may have any form
            return ": is base_url right? it usually ends in /v1"
        if self.server.model in served:
            return ": it has the model and not this path: is base_url right?"
        hint = nearest(self.server.model, served) or f"; it has: {', '.join(served[:5]) or 'none'}"
        return f": no model '{self.server.model}'{hint}"

    def _final(self, what: str) -> JudgeError:
        return JudgeError(self._clean(f"the model server {self.url}: {what}"))

    def _clean(self, text: str) -> str:
        """Without the key, which some servers repeat, and without characters that a terminal obeys."""
        shown = text.replace(self._key, "***") if self._key else text
        printable = "".join(char if char.isprintable() else "?" for char in shown)
        return printable if len(printable) <= SHOWN else printable[: SHOWN - 1] + "…"
