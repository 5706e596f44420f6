"""What all judges that ask a language model share: their constructor keys, and asking for one verdict."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from judges.llm_client import TOKEN_LIMITS, ChatClient, Server
from judges.llm_faults import NoAnswerError, RefusedError
from judges.llm_meter import Prices
from judges.llm_prompts import Chat, Filled, Template, own_template
from judges.llm_reply import Reply
from judges.llm_slots import Slots
from judges.llm_verdicts import read_verdict
from online_dpo.errors import JudgeError, nearest
from online_dpo.judging import Abstention, BaseJudge, Opinion

CRITERIA = "Helpfulness, correctness and clarity, and how well the answer does what the request asks for."
LEAST = {"max_tokens": 1, "verdict_tokens": 1, "concurrency": 1, "top_logprobs": 2, "retries": 0}
ABOVE_ZERO = ("timeout_s", "patience_s")
FROM_ZERO = ("price_in", "price_out", "temperature", "min_mass")
MAY_BE_NONE = ("price_in", "price_out", "temperature")
LOGPROBS = {"auto": "auto", "yes": "yes", "no": "no", True: "yes", False: "no"}
"""YAML reads yes and no as true and false."""
Details = dict[str, float | str | bool | None]


@dataclass(kw_only=True, eq=False)
class LLMBase(BaseJudge):
    """The keys of every judge that asks a language model behind an OpenAI-compatible chat endpoint.

    What is asked:
        model: the server's name for it.
        criteria: what makes an answer good, in your words; stands in the template's field {criteria}.
        template: a file to use in place of the judge's own in `judges/templates`.
        reasoning: the model reasons first, in at most `max_tokens`; a second request asks for the verdict.
        verdict_tokens: the longest verdict; raise it for models that think before they answer.
        logprobs: "auto" uses the probabilities of the verdict's tokens where the server gives them; "yes" insists;
            "no" takes the text alone. `top_logprobs`: how many tokens' probabilities to ask for.
        min_mass: below this probability of all valid verdicts together the judge abstains.
        temperature, seed: as the server has them; None: not sent.
        special_tokens: strings that the model's tokenizer reads as special tokens, beyond the usual ones.
        token_limit: the name that the server has for the limit on tokens ("max_completion_tokens" for some).
        extra_body: more keys of the request, such as {chat_template_kwargs: {enable_thinking: false}}.
        version: anything; part of what verdicts are remembered by. Change it when other weights get the same name.

    How it is asked (changes no verdict, so it may change within a run):
        base_url: default: the environment's OPENAI_BASE_URL, else OpenAI's own. The same model moves between ports and
            machines all the time; therefore it is no part of what verdicts are remembered by.
        api_key_env: the NAME of the environment variable with the key; default OPENAI_API_KEY. A server without keys
            needs none.
        concurrency: requests at once.
        timeout_s: the longest wait for a reply. retries: how often a slow or broken one is asked for again; then the
            judge abstains on this one, and a later run asks anew. patience_s: how long one request waits for a server
            that is away or overloaded; then the run ends, with everything kept that was answered.
        price_in, price_out: per million tokens; what the ledger's `cost` is counted by.
    """

    model: str
    criteria: str = CRITERIA
    template: str | None = None
    reasoning: bool = False
    max_tokens: int = 512
    verdict_tokens: int = 8
    logprobs: Any = "auto"
    top_logprobs: int = 20
    min_mass: float = 0.5
    temperature: float | None = 0.0
    seed: int | None = None
    special_tokens: Collection[str] = ()
    token_limit: str = "max_tokens"  # noqa: S105 # a key's name, no secret
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    base_url: str | None = None
    api_key_env: str | None = None
    concurrency: int = 8
    timeout_s: float = 60.0
    retries: int = 2
    patience_s: float = 300.0
    price_in: float | None = None
    price_out: float | None = None

    file_params: ClassVar[tuple[str, ...]] = ("template",)
    neutral_params: ClassVar[tuple[str, ...]] = (
        "base_url", "api_key_env", "concurrency", "timeout_s", "retries", "patience_s", "price_in", "price_out",
    )  # fmt: skip
    template_name: ClassVar[str] = ""
    slot_fields: ClassVar[tuple[str, ...]] = ()
    plain_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self._check()
        self.logprobs = LOGPROBS[self.logprobs]
        self.concurrent = self.concurrency
        self.uncounted = ("cost",) if self.price_in is None and self.price_out is None else ()
        self.slots = Slots(tuple(self.special_tokens))
        own = self.criteria != CRITERIA
        self.filled_in = Template(
            Path(self.template) if self.template else own_template(self.template_name),
            slots=self.slot_fields,
            plain=("criteria", *self.plain_fields),
            # Criteria that the template has no place for would be passed over in silence.
            needed=("criteria",) if own else (),
            reasoning=self.reasoning,
        )
        self.gives_logprobs: bool | None = None if self.logprobs == "auto" else self.logprobs == "yes"
        try:
            self.client = ChatClient(self._server())
        except JudgeError as error:
            raise self._wrong(str(error)) from error

    def ledger(self) -> dict[str, float]:
        """calls (requests answered), retries, prompt_tokens, completion_tokens, tokens, cost (where there are prices).

        `tokens` is the sum of the two kinds. As `BaseJudge.ledger`: since it was last asked.
        """
        return self.client.meter.take()

    # --- asking ---

    def verdict(self, request: Filled, options: Mapping[str, float]) -> Opinion | Abstention:
        """The expected value of `options` (each as the model may answer it, with its worth), or why there is none."""
        try:
            details = Details()
            reply = self._last_reply(request, self.verdict_tokens, details, logprobs=True)
        except NoAnswerError as error:
            return Abstention(error.reason, error.passing)
        if self.logprobs == "yes" and reply.tokens is None:
            raise self._wrong("the server gives no log-probs: use logprobs: auto")
        found = read_verdict(reply, options, logprobs=self.logprobs != "no", min_mass=self.min_mass)
        return found if isinstance(found, Abstention) else Opinion(found.value, {**found.details, **details})

    def _last_reply(self, request: Filled, tokens: int, details: Details, *, logprobs: bool) -> Reply:
        """The reply that holds the verdict, after the reasoning where there is some; fills `details`."""
        if not self.reasoning:
            chat = request.first(reasoning=False)
        else:
            thoughts = self.client.ask(request.first(reasoning=True), max_tokens=self.max_tokens)
            self._note(thoughts, details)
            if not thoughts.text.strip():
                raise NoAnswerError("no reasoning came", passing=False)
            details["reasoning"] = thoughts.text
            details["reasoning_cut"] = thoughts.stop == "length"
            # What the model wrote may quote a candidate, special tokens and all.
            chat = request.second(self.slots.neutral(thoughts.text))
        reply = self._ask_verdict(chat, tokens) if logprobs else self.client.ask(chat, max_tokens=tokens)
        self._note(reply, details)
        return reply

    def _ask_verdict(self, chat: Chat, tokens: int) -> Reply:
        """With log-probs, unless it is known that the server gives none."""
        if self.gives_logprobs is False:
            return self.client.ask(chat, max_tokens=tokens)
        try:
            reply = self.client.ask(chat, max_tokens=tokens, top_logprobs=self.top_logprobs)
        except RefusedError:
            if self.gives_logprobs:
                raise
            # Refused for the log-probs, or for the prompt? The same request without them tells.
            reply = self.client.ask(chat, max_tokens=tokens)
            self.gives_logprobs = False
            return reply
        if self.gives_logprobs is None and reply.tokens is not None:
            self.gives_logprobs = True
        return reply

    def _note(self, reply: Reply, details: Details) -> None:
        for item, amount in self.client.amounts(reply).items():
            before = details.get(item, 0.0)
            details[item] = amount + (before if isinstance(before, float | int) else 0.0)
        if reply.model and reply.model != self.model:
            details["served"] = reply.model

    # --- checking ---

    def _server(self) -> Server:
        return Server(
            model=self.model,
            base_url=self.base_url,
            api_key_env=self.api_key_env,
            temperature=self.temperature,
            seed=self.seed,
            token_limit=self.token_limit,
            extra_body=self.extra_body,
            timeout_s=self.timeout_s,
            retries=self.retries,
            patience_s=self.patience_s,
            prices=Prices(self.price_in, self.price_out),
        )

    def _check(self) -> None:
        for key, least in LEAST.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise self._wrong(f"{key} must be a whole number from {least}, found {value!r:.60}")
        for key in (*ABOVE_ZERO, *FROM_ZERO):
            self._check_number(key, getattr(self, key))
        if self.min_mass > 1.0:
            raise self._wrong(f"min_mass is a probability, found {self.min_mass!r}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise self._wrong(f"seed must be a whole number, found {self.seed!r:.60}")
        self._check_words()

    def _check_number(self, key: str, value: Any) -> None:
        if value is None and key in MAY_BE_NONE:
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (value > 0 if key in ABOVE_ZERO else value >= 0) or value == float("inf"):
            raise self._wrong(
                f"{key} must be a number {'above' if key in ABOVE_ZERO else 'from'} 0, found {value!r:.60}"
            )

    def _check_words(self) -> None:
        for key in ("model", "criteria"):
            value = getattr(self, key)
            if not isinstance(value, str) or not value.strip():
                raise self._wrong(f"{key} must be text, found {value!r:.60}")
        if not isinstance(self.reasoning, bool):
            raise self._wrong(f"reasoning must be true or false, found {self.reasoning!r:.60}")
        if not isinstance(self.logprobs, str | bool) or self.logprobs not in LOGPROBS:
            raise self._wrong(f"logprobs must be auto, yes or no, found {self.logprobs!r:.60}")
        if self.token_limit not in TOKEN_LIMITS:
            raise self._wrong(
                f"token_limit must be {' or '.join(TOKEN_LIMITS)}{nearest(self.token_limit, TOKEN_LIMITS)}"
            )
        if not isinstance(self.extra_body, Mapping):
            raise self._wrong(f"extra_body must hold keys and values, found {self.extra_body!r:.60}")
        if isinstance(self.special_tokens, str) or not all(map(_is_token, self.special_tokens)):
            raise self._wrong("special_tokens must be a list of strings of 2 characters or more, without white space")

    def _wrong(self, what: str) -> JudgeError:
        return JudgeError(f"{type(self).__name__}: {what}")


def _is_token(token: object) -> bool:
    return isinstance(token, str) and len(token) > 1 and not any(char.isspace() for char in token)
