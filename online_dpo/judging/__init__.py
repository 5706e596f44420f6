"""Judges: what they are, how "module:Class" becomes one, and how a round's candidates get their verdicts.

A judge of a user's own imports from here alone: `PointwiseJudge` or `PairwiseJudge`, `Abstention`, `Opinion`.
"""

from online_dpo.judging.against import judge_against
from online_dpo.judging.ahead import Ahead, JudgeAhead
from online_dpo.judging.answers import Answer, Means
from online_dpo.judging.asked import AskedJudge, Asking
from online_dpo.judging.cache import VerdictCache, read_spent
from online_dpo.judging.compared import Compared
from online_dpo.judging.digests import judge_digest
from online_dpo.judging.importing import import_object
from online_dpo.judging.interface import (
    Abstention,
    BaseJudge,
    Comparison,
    Disagreement,
    Item,
    Judge,
    LiveModel,
    Opinion,
    PairwiseJudge,
    PointwiseJudge,
    Score,
)
from online_dpo.judging.kinds import as_judge, judge_name
from online_dpo.judging.loading import Place, asks_policy, compares, load_judge, open_judge
from online_dpo.judging.verdicts import Judging, abstain_reasons, chunk_size, judge_all, mean_details

__all__ = [
    "Abstention",
    "Ahead",
    "Answer",
    "AskedJudge",
    "Asking",
    "BaseJudge",
    "Compared",
    "Comparison",
    "Disagreement",
    "Item",
    "Judge",
    "JudgeAhead",
    "Judging",
    "LiveModel",
    "Means",
    "Opinion",
    "PairwiseJudge",
    "Place",
    "PointwiseJudge",
    "Score",
    "VerdictCache",
    "abstain_reasons",
    "as_judge",
    "asks_policy",
    "chunk_size",
    "compares",
    "import_object",
    "judge_against",
    "judge_all",
    "judge_digest",
    "judge_name",
    "load_judge",
    "mean_details",
    "open_judge",
    "read_spent",
]
