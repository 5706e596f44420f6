"""What the tests of sources share: runs with fakes, and what their rounds hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import test_loop
from fakes import FakeLearner
from test_loop import HELD_OUT, TRAIN

from online_dpo.config import Experiment
from online_dpo.files import write_json
from online_dpo.records import read_candidates, read_pairs, write_prompts
from online_dpo.sources.streamed import all_prompts_digest
from online_dpo.types import Pair

TWO_ARMS = test_loop.TWO_ARMS


def experiment(**changes: Any) -> Experiment:
    """`test_loop.experiment` without measures that these tests do not look at."""
    return test_loop.experiment(**{"evaluation": {"off_policy": 0}, **changes})


class World(test_loop.World):
    """`test_loop.World`; `stop`: policies (by id) whose training meets a non-finite loss."""

    def __init__(self, root: Path, spec: Experiment, **parts: Any) -> None:
        stop = parts.pop("stop", ())
        parts.setdefault("learner", lambda calls: FakeLearner(calls, stop=lambda policy_id: policy_id in stop))
        super().__init__(root, spec, **parts)

    def go(self) -> World:
        super().go()
        return self

    def reopen(self) -> World:
        return World(self.root, self.run.experiment, **self.parts)

    def save_prompts(self, model: str = "digest") -> None:
        """What the folder of a real run has beside: its prompts, and the digests of these and of the model."""
        write_prompts(self.root / "prompts.parquet", {"train": TRAIN, "held_out": HELD_OUT})
        kept = {"model": {"digest": model}, "prompts": {"digest": all_prompts_digest(TRAIN, HELD_OUT)}}
        write_json(self.root / "manifest.json", self.run.store.manifest | kept)


def pairs_of(world: World, arm: str, index: int) -> list[Pair]:
    """The pairs that a round trained on."""
    folder = world.folder(arm, index).path
    prompts = {prompt.id: prompt for prompt in TRAIN}
    return read_pairs(folder / "pairs.parquet", prompts, read_candidates(folder / "candidates.parquet"))


def rows_of(world: World, arm: str, index: int) -> list[tuple[str, tuple[int, ...], tuple[float, ...], int]]:
    """The answers of a round but for their indices."""
    candidates = read_candidates(world.folder(arm, index).path / "candidates.parquet")
    return [(one.prompt_id, one.token_ids, one.logprobs, one.seed) for one in candidates]


def tokens_of(pairs: Sequence[Pair]) -> list[tuple[Any, ...]]:
    """What of pairs a learner sees: everything but the indices of their answers."""
    return [
        (pair.prompt.id, pair.chosen.token_ids, pair.rejected.token_ids, pair.chosen.logprobs, pair.rejected.logprobs)
        for pair in pairs
    ]
