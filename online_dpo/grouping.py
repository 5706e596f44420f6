"""Verdicts become groups: all judged answers of a prompt, for a policy gradient. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from online_dpo.pairing import judged_answers
from online_dpo.types import Abstain, Candidate, Group, Prompt, Verdict


def make_groups(
    prompts: Mapping[str, Prompt], candidates: Sequence[Candidate], verdicts: Sequence[Verdict | Abstain]
) -> tuple[Group, ...]:
    """A group for each prompt with two or more answers on which the judge did not abstain, in the order of `prompts`.

    Raises `DataError` when a candidate has no verdict, stands twice, or belongs to no prompt.
    """
    judged = judged_answers(prompts, candidates, verdicts)
    return tuple(
        Group(prompts[name], tuple(one.candidate for one in judged[name]), tuple(one.score for one in judged[name]))
        for name in prompts
        if len(judged.get(name, ())) > 1
    )
