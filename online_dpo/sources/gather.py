"""Which module gives an arm's round its prompts and pairs: the one place that knows every kind of source.

A part of a mixture is gathered as an arm whose source is the part's, into a folder inside the round's.
"""

from __future__ import annotations

from online_dpo.arms import Arm
from online_dpo.rounds import Pinned
from online_dpo.source_spec import source_kind
from online_dpo.sources.dataset import gather_dataset
from online_dpo.sources.datasets import dataset_prompts
from online_dpo.sources.fresh import fresh_prompts, gather_fresh
from online_dpo.sources.history import gather_history, history_prompts
from online_dpo.sources.mixture import Gather, gather_mixture, mixture_prompts
from online_dpo.sources.refresh import gather_refreshed, refreshed_prompts
from online_dpo.sources.round_data import RoundData
from online_dpo.sources.spin import gather_spin
from online_dpo.sources.stream import gather_stream, stream_prompts
from online_dpo.store import RoundFolder
from online_dpo.types import Prompt


def round_prompts(arm: Arm, index: int) -> tuple[Prompt, ...]:
    """All prompts that the pairs of round `index` (1-based) of `arm` are of, each once."""
    match source_kind(arm.settings.source):
        case "dataset" | "spin":
            return dataset_prompts(arm, index)
        case "stream":
            return stream_prompts(arm, index, round_prompts)
        case "history":
            return history_prompts(arm, index)
        case "mixture":
            return mixture_prompts(arm, index, round_prompts)
        case "refresh_when":
            return refreshed_prompts(arm, index)
    return fresh_prompts(arm, index)


def gather(arm: Arm, folder: RoundFolder, pinned: Pinned) -> RoundData:
    """The round's pairs, by the arm's source."""
    kind = source_kind(arm.settings.source)
    if kind == "mixture":
        return gather_mixture(arm, folder, pinned, gather, round_prompts)
    return GATHERERS.get(kind, gather_fresh)(arm, folder, pinned)


GATHERERS: dict[str, Gather] = {
    "dataset": gather_dataset,
    "spin": gather_spin,
    "stream": gather_stream,
    "history": gather_history,
    "refresh_when": gather_refreshed,
}
"""By kind of source; any other is fresh answers of one policy."""
