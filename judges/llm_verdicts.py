"""From a model's reply to a verdict: by the probabilities of its tokens where there are any, else by its whole text."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

from judges.llm_reply import Reply, Token, TopToken
from online_dpo.judging import Abstention, Opinion

UNRESOLVED = 0.01
"""The share of the options' probability that may stay unclear (is "1" the grade 1, or the beginning of 10?)."""
MARKS = " \t\r\n*_`\"'()[].:"
"""What may stand around a verdict in text: white space, emphasis, quotes, brackets, a full stop."""
WORD_STARTS = "▁ĠĊ"
"""How some servers write a token's leading space or new line."""
NO_VERDICT = Abstention("the answer is not a verdict")
TOO_LITTLE = Abstention("verdict not among the options")
NO_NUMBERS = Abstention("the log-probs are not log-probabilities")
STOPPED = {
    "content_filter": Abstention("stopped by the server's content filter"),
    "refusal": Abstention("the model refused"),
}


def read_verdict(
    reply: Reply, options: Mapping[str, float], *, logprobs: bool, min_mass: float
) -> Opinion | Abstention:
    """The expected value of `options` (what the model may answer, and what each is worth).

    Each option weighs as its tokens' probability, divided by that of all options; below `min_mass` in all, or where
    they have none, the model meant to say something else. Without log-probs (or `logprobs` false) the whole text must
    be one of the options.
    """
    if reply.stop in STOPPED:
        return STOPPED[reply.stop]
    tokens = reply.tokens if logprobs else None
    if not tokens:
        return _by_text(reply, options)
    if not all(map(_sound, tokens)):
        return NO_NUMBERS
    masses, unclear = option_masses(tokens, options)
    mass = math.fsum(masses.values())
    if mass + unclear < min_mass or not mass + unclear:
        return TOO_LITTLE
    if unclear > UNRESOLVED * (mass + unclear):
        return _by_text(reply, options)
    value = math.fsum(options[option] * p for option, p in masses.items()) / mass
    low, high = min(options.values()), max(options.values())
    return Opinion(min(max(value, low), high), {"by": "logprobs", "mass": min(mass, 1.0)})


def option_masses(tokens: Sequence[Token], options: Collection[str]) -> tuple[dict[str, float], float]:
    """Each option's probability, and the probability that stays unclear.

    Follows the tokens that came. Where "1" may go on to "10", the next token's probabilities tell, if "1" is what
    came; if something else came, nobody knows how "1" would have gone on, unless "10" is a token of its own.
    Leading white space is passed over.
    """
    masses = dict.fromkeys(options, 0.0)
    unclear, path, reached = 0.0, "", 1.0
    start = next((place for place, token in enumerate(tokens) if _said(token)), 0)
    for token in tokens[start:]:
        came = path + _said(token)
        likely = [(path + _said(top), reached * math.exp(top.logprob)) for top in token.top_logprobs]
        longer = [(text, p) for text, p in likely if text != path and _leads(text, options)]
        whole = {text for text, _ in longer} & set(options)
        final = {text for text in whole if not _longer(text, options) - whole}
        if path in options:  # it ended here, unless what comes next makes another option of it
            masses[path] += max(reached - math.fsum(p for _, p in longer), 0.0)
        for text, p in longer:
            if text in final:
                masses[text] += p
            elif text != came:
                unclear += p
        if came == path or came in final or not _longer(came, options):
            return masses, unclear
        reached = math.fsum(p for text, p in likely if text == came) or reached * math.exp(token.logprob)
        path = came
    return masses, unclear + reached  # the tokens end where the path could still go on


def _leads(text: str, options: Collection[str]) -> bool:
    return text in options or bool(_longer(text, options))


def _longer(text: str, options: Collection[str]) -> set[str]:
    """The options that begin with `text` and go on."""
    return {option for option in options if option.startswith(text) and option != text}


def _said(token: TopToken) -> str:
    return token.token.strip().lstrip(WORD_STARTS).strip()


def _sound(token: Token) -> bool:
    """Whether the numbers can be log-probabilities: none is NaN or above 0, and a place's sum is at most 1."""
    logs = [top.logprob for top in token.top_logprobs] + [token.logprob]
    if any(math.isnan(value) or value > 1e-4 for value in logs):
        return False
    return math.fsum(math.exp(value) for value in logs[:-1]) < 1.01


def _by_text(reply: Reply, options: Mapping[str, float]) -> Opinion | Abstention:
    """The option that the whole text is. A text that was cut off might have gone on to say something else."""
    said = reply.text.strip(MARKS)
    if reply.stop == "length" or said not in options:
        return NO_VERDICT
    return Opinion(options[said], {"by": "text"})


def read_ranking(reply: Reply, labels: Sequence[str]) -> list[int] | Abstention:
    """The places of `labels` (0: best) in a text such as "B > A > C": each label once, nothing else."""
    if reply.stop in STOPPED:
        return STOPPED[reply.stop]
    order = [part.strip(MARKS) for part in re.split(r"[>,\n]", reply.text.strip(MARKS))]
    if reply.stop == "length" or sorted(order) != sorted(labels):
        return Abstention("the answer is not a ranking")
    return [order.index(label) for label in labels]
