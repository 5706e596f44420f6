"""From preferences to the token ids that a reward model is trained on, and the split by prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from online_dpo.errors import DataError, one_line
from online_dpo.judging import import_object
from online_dpo.preferences import Preference, group_of


@dataclass(frozen=True, slots=True)
class TokenPair:
    """Prompt and answer together, as token ids: of the chosen answer and of the rejected one."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of both."""
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The pairs that the model can read, with their token ids, and how many it cannot."""

    preferences: tuple[Preference, ...]
    pairs: tuple[TokenPair, ...]
    too_long: int


def encode(preferences: Sequence[Preference], tokenizer: Any, limit: int) -> Encoded:
    """Token ids as `judges.reward_model` makes them; pairs with a text of more than `limit` tokens are left out.

    Raises `DataError` when none is left, or the chat template refuses a prompt.
    """
    chat_ids = import_object("judges._classifier:chat_ids")
    kept: list[Preference] = []
    pairs: list[TokenPair] = []
    for preference in preferences:
        try:
            texts = [tuple(chat_ids(tokenizer, preference.messages, text)) for text in _answers(preference)]
        except Exception as error:  # a template is code of the model's author: it may raise anything
            raise DataError(f"pair '{preference.id}': the chat template fails: {one_line(error)}") from error
        if all(0 < len(text) <= limit for text in texts):
            kept.append(preference)
            pairs.append(TokenPair(*texts))
    if not pairs:
        raise DataError(f"all {len(preferences)} pairs are longer than {limit} tokens")
    return Encoded(tuple(kept), tuple(pairs), len(preferences) - len(pairs))


def _answers(preference: Preference) -> tuple[str, str]:
    return preference.chosen, preference.rejected


def split_by_prompt(preferences: Sequence[Preference], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of the pairs to train on and of the held-out ones; no prompt is in both.

    `share` of the prompts is held out, at least one. Raises `DataError` when there are fewer than two prompts.
    """
    groups: dict[str, list[int]] = {}
    for place, preference in enumerate(preferences):
        groups.setdefault(group_of(preference), []).append(place)
    names = sorted(groups)
    if len(names) < 2:
        raise DataError(f"{len(preferences)} pairs of one prompt: nothing could be held out")
    random.Random(seed).shuffle(names)
    out = min(len(names) - 1, max(1, round(share * len(names))))
    held_out = sorted(place for name in names[:out] for place in groups[name])
    train = sorted(place for name in names[out:] for place in groups[name])
    return train, held_out
