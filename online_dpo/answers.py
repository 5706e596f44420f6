"""A given answer's tokens: what the policy would have sampled to write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from online_dpo.errors import DataError, one_line
from online_dpo.prompts import encode, has_template, plain_ids
from online_dpo.types import Message

ANCHORS = ("a", ".", "\n")
"""Texts that an answer is put behind to be tokenised where its own prompt would run into it."""


@dataclass(frozen=True)
class AnswerEncoder:
    """Tokenises prompts and answers that nobody sampled, as the policy would see and sample them.

    `ends`: the tokens at which the engine stops (`models.end_token_ids`).
    """

    tokenizer: Any
    ends: tuple[int, ...]

    def prompt(self, messages: Sequence[Message], where: str = "prompt") -> tuple[int, ...]:
        """The prompt's tokens: `prompts.encode`."""
        return encode(messages, self.tokenizer, where)

    def answer(self, messages: Sequence[Message], answer: str, where: str = "answer") -> tuple[int, ...] | None:
        """The tokens that follow those of `prompt(messages)`: the answer and the token that ends it.

        Behind a chat template the answer begins where the template lets it begin, and ends with the end-of-turn token
        that the template writes, else with the model's end token. Plain text is joined to its prompt by one space,
        unless the prompt ends with white space. The prompt's tokens are never merged with the answer's first.
        None for an answer that contains a token at which the policy would have stopped.
        """
        return self.answers(messages, [answer], self.prompt(messages, where), where)[0]

    def answers(
        self, messages: Sequence[Message], answers: Sequence[str], prompt_ids: tuple[int, ...], where: str = "answer"
    ) -> list[tuple[int, ...] | None]:
        """`answer` of each of several answers to one prompt, whose tokens are `prompt_ids`."""
        chat = has_template(self.tokenizer)
        before = self._rendered(messages, where, begins_answer=True) if chat else messages[0].content
        found: list[tuple[int, ...] | None] = []
        for answer in answers:
            after, end = self._turn(before, messages, answer, where) if chat else self._plain(before, answer)
            token_ids = self._behind(prompt_ids, before, after)
            if {end, *self.ends} & set(token_ids):
                found.append(None)
            else:
                found.append(token_ids if end is None else (*token_ids, end))
        return found

    def _plain(self, before: str, answer: str) -> tuple[str, int | None]:
        return answer if before[-1:].isspace() else f" {answer}", self._end()

    def _turn(self, before: str, messages: Sequence[Message], answer: str, where: str) -> tuple[str, int | None]:
        """What the template makes of the answer behind the prompt's text `before`, and the turn's end token."""
        whole = self._rendered((*messages, Message("assistant", answer)), where, begins_answer=False)
        turn = whole[len(before) :]
        if not whole.startswith(before) or answer not in turn:
            return answer, self._end()  # a template that writes finished turns in another way
        stop = turn.index(answer) + len(answer)
        special = {*self.ends, *self.tokenizer.all_special_ids}
        end = next((token for token in self._ids(turn[stop:]) if token in special), None)
        return turn[:stop], self._end() if end is None else end

    def _rendered(self, messages: Sequence[Message], where: str, *, begins_answer: bool) -> str:
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=begins_answer, tokenize=False)
        except (TemplateError, ValueError) as error:
            raise DataError(f"{where}: the model's chat template refuses it: {one_line(error)}") from error
        return str(text)

    def _end(self) -> int | None:
        """The token that ends an answer where no template says; None for a model that has none."""
        eos = self.tokenizer.eos_token_id
        if eos is not None and (eos in self.ends or not self.ends):
            return int(eos)
        return self.ends[0] if self.ends else None

    def _behind(self, prompt_ids: tuple[int, ...], before: str, after: str) -> tuple[int, ...]:
        """The tokens of text `after` behind those of `before`, which stay `prompt_ids`."""
        joint = self._ids(before + after) if has_template(self.tokenizer) else plain_ids(before + after, self.tokenizer)
        if joint[: len(prompt_ids)] == prompt_ids and len(joint) > len(prompt_ids):
            return joint[len(prompt_ids) :]
        for anchor in ANCHORS:
            alone, behind = self._ids(anchor), self._ids(anchor + after)
            if behind[: len(alone)] == alone:
                return behind[len(alone) :]
        return self._ids(after)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"])
