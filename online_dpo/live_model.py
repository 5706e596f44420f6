"""The policy in the live engine as something to talk to: what a self-judging policy is asked by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from online_dpo.config import SamplingSpec
from online_dpo.prompts import encode
from online_dpo.protocols import Engine, SampleRequest
from online_dpo.types import Message, Prompt


class EngineModel:
    """Implements `judging.LiveModel` on an engine that holds the policy already.

    `limit`: the most tokens of chat and answer together that the engine takes.
    """

    def __init__(self, engine: Engine, tokenizer: Any, limit: int) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.limit = limit

    def generate(
        self, chats: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[str | None]:
        """See `judging.LiveModel`."""
        contexts = [self._context(chat) for chat in chats]
        requests = [
            SampleRequest(Prompt(str(place), tuple(chat), context), (seed,))
            for place, (chat, context, seed) in enumerate(zip(chats, contexts, seeds, strict=True))
            if len(context) + max_tokens < self.limit
        ]
        answers: list[str | None] = [None] * len(chats)
        if requests:
            sampling = SamplingSpec(n=1, temperature=temperature, max_tokens=max_tokens)
            for group in self.engine.sample(requests, sampling):
                answers[int(group[0].prompt_id)] = group[0].text
        return answers

    def score(
        self, chats: Sequence[Sequence[Message]], continuations: Sequence[Sequence[str]]
    ) -> list[list[float] | None]:
        """See `judging.LiveModel`."""
        rows: list[list[float] | None] = [None] * len(chats)
        asked: list[tuple[int, tuple[tuple[int, ...], tuple[int, ...]]]] = []
        for place, (chat, texts) in enumerate(zip(chats, continuations, strict=True)):
            context = self._context(chat)
            ends = [tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
            if len(context) + max(len(end) for end in ends) < self.limit:
                asked += [(place, (context, end)) for end in ends]
                rows[place] = []
        scored = self.engine.score([item for _, item in asked]) if asked else []
        for (place, _), logprobs in zip(asked, scored, strict=True):
            row = rows[place]
            if row is not None:
                row.append(math.fsum(logprobs))
        return rows

    def _context(self, chat: Sequence[Message]) -> tuple[int, ...]:
        """The chat as tokens, the answer's turn begun. A model without a chat template reads one plain text."""
        if not getattr(self.tokenizer, "chat_template", None):
            chat = (Message("user", "\n\n".join(message.content for message in chat)),)
        return encode(chat, self.tokenizer, "a judge's question")
