"""A contender of `race.py`: this project's learner, one optimiser step a turn. Started by `turns.Contender`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import turns
from stopwatch import Stopwatch

from online_dpo.backends.learner import LocalLearner, batch_order
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.config import DPOSpec
from online_dpo.protocols import TrainJob, TrainStart, TrainStep
from online_dpo.types import Candidate, Pair, Policy, Prompt

SEED = 0


def work(options: dict[str, Any]) -> Iterator[turns.Said]:
    """First turn: load. Second: the check of the engine's log-probs, once a round. Then one step a turn."""
    torch.set_num_threads(turns.cores())
    initial = Policy("initial", Path(options["model"]), "initial")
    model = PolicyModel(
        initial,
        model_name="benchmark",
        dtype=options["dtype"],
        layout=options["layout"],
        tokens_per_pass=options["tokens_per_pass"],
    )
    loaded = {
        "beside_mib": turns.held_beside(model.trainable),
        "weights": sum(parameter.numel() for parameter in model.trainable),
    }
    # The same optimiser as TRL's side: AdamW (fused), constant rate, gradients clipped at norm 1.
    dpo = DPOSpec(lr=options["lr"], batch_size=options["batch"], warmup=0.0, clip=1.0)
    rows = json.loads(Path(options["rows"]).read_text(encoding="utf-8"))
    pairs = pairs_of(rows)
    learner = LocalLearner(model, pairs[0].prompt.token_ids[:2])
    pairs = in_file_order(as_sampled(learner, initial, pairs, Path(options["logps"])), dpo)
    yield loaded
    events = learner.train(
        TrainJob(initial, initial, initial, tuple(pairs), dpo, policy_id="benchmark", out=Path("unused"), seed=SEED)
    )
    watch = Stopwatch()
    while True:
        watch.start()
        event = next(events)
        yield watch.stop() | _particulars(event)


def pairs_of(rows: Sequence[dict[str, list[int]]]) -> list[Pair]:
    """Rows as pairs whose candidates have no log-probs yet."""
    pairs = []
    for number, row in enumerate(rows):
        prompt = Prompt(str(number), (), tuple(row["prompt"]))
        chosen, rejected = (
            Candidate(prompt.id, index, "", tuple(row[side]), (0.0,) * len(row[side]), "length", index)
            for index, side in enumerate(("chosen", "rejected"))
        )
        pairs.append(Pair(prompt, chosen, rejected, 1.0, 0.0))
    return pairs


def as_sampled(learner: LocalLearner, initial: Policy, pairs: Sequence[Pair], kept: Path) -> list[Pair]:
    """The pairs with the log-probs that an engine stores as it samples: this policy's own. Not timed.

    They are kept in the file `kept`: the first of several contenders computes them, and the others read them.
    """
    if not kept.exists():
        items = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
        kept.write_text(json.dumps(learner.score(initial, items)), encoding="utf-8")
    logps = [tuple(values) for values in json.loads(kept.read_text(encoding="utf-8"))]
    return [
        replace(pair, chosen=replace(pair.chosen, logprobs=chosen), rejected=replace(pair.rejected, logprobs=rejected))
        for pair, chosen, rejected in zip(pairs, logps[0::2], logps[1::2], strict=True)
    ]


def in_file_order(pairs: Sequence[Pair], dpo: DPOSpec) -> list[Pair]:
    """The pairs placed so that the learner's seeded permutation takes them in the order they have here.

    Each step then has the same pairs as on TRL's side.
    """
    order = [index for batch in batch_order(len(pairs), dpo, SEED) for index in batch]
    placed = dict(zip(order, pairs, strict=True))
    return [placed[index] for index in range(len(pairs))]


def _particulars(event: object) -> turns.Said:
    """What tells whether two layouts compute the same."""
    if isinstance(event, TrainStart):
        assert event.engine_gap_token is not None  # the pairs are the initial policy's own
        return {"engine_gap_token": event.engine_gap_token}
    assert isinstance(event, TrainStep)
    return {"loss": event.loss, "grad_norm": event.grad_norm}


if __name__ == "__main__":
    turns.serve(work(turns.options()))
