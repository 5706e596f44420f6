"""Where a round's reference log-probs come from, and that each way gives the same ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_parts import PAIR_EACH, farthest, gradients_of, job_of, learner_of, result_of, shifted

from online_dpo.backends.learner import LocalLearner
from online_dpo.backends.logp_cache import LogpCache
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.backends.reference_logps import PairLogps, items_of, reference_logps, stored_logps
from online_dpo.config import DPOSpec
from online_dpo.errors import RunFolderError
from online_dpo.packing import Item
from online_dpo.protocols import TrainJob, TrainStart
from online_dpo.types import Pair, Policy

DPO = DPOSpec(lr=1e-3, batch_size=6, warmup=0.0)
Moved = Callable[..., Policy]


@contextmanager
def watched(model: PolicyModel) -> Iterator[tuple[list[str], list[int]]]:
    """Inside, the digests of the policies that are asked for, and the number of items of each scoring."""
    digests: list[str] = []
    scored: list[int] = []
    load, per_token = model.load, model.per_token

    def loaded(policy: Policy, seed: int = 0) -> None:
        digests.append(policy.digest)
        load(policy, seed)

    def counted(items: Sequence[Item]) -> list[list[float]]:
        scored.append(len(items))
        return per_token(items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load", loaded)
        patch.setattr(model, "per_token", counted)
        yield digests, scored


def found_by(learner: LocalLearner, job: TrainJob, tolerance: float = 1e-3) -> tuple[list[PairLogps], TrainStart]:
    return reference_logps(learner.model, job, tolerance, needed=True)


def flat(values: Sequence[PairLogps]) -> list[float]:
    return [x for pair in values for side in pair for x in side]


@pytest.fixture
def job(initial: Policy, pairs: list[Pair], moved: Moved, tmp_path: Path) -> TrainJob:
    """Against another policy than the source, with a cache that is not there yet."""
    return job_of(initial, pairs, DPO, tmp_path / "next", reference=moved(), cache=tmp_path / "logps.sqlite")


def test_items_are_all_chosen_then_all_rejected(pairs: list[Pair]) -> None:
    items = items_of(pairs)
    assert items[:6] == [(p.prompt.token_ids, p.chosen.token_ids) for p in pairs]
    assert items[6:] == [(p.prompt.token_ids, p.rejected.token_ids) for p in pairs]


# --- the engine's ---


def test_the_engines_own_serve_where_it_sampled(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """Nothing but the sample is scored: eight answers of four pairs, at the source's weights; nothing is cached."""
    learner = learner_of(initial)
    plain = job_of(initial, pairs, DPO, tmp_path / "next", cache=tmp_path / "logps.sqlite")
    with watched(learner.model) as (digests, scored):
        values, start = found_by(learner, plain)
    assert values == stored_logps(pairs)
    assert start.reference_from == "engine"
    assert (digests, scored) == ([initial.digest], [8])
    assert not (tmp_path / "logps.sqlite").exists()


def test_gap_decides(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """The same reference, log-probs off by 0.01: above the tolerance they are computed, below they serve."""
    off = [replace(pair, chosen=shifted(pair.chosen, 0.01)) for pair in pairs]
    learner = learner_of(initial)
    plain = job_of(initial, off, DPO, tmp_path / "next")
    honest = flat(stored_logps(pairs))
    for tolerance, origin, expected in ((1e-3, "learner", honest), (0.02, "engine", flat(stored_logps(off)))):
        values, start = found_by(learner, plain, tolerance)
        assert start.reference_from == origin
        assert start.engine_gap_token == pytest.approx(0.01, abs=1e-4)
        assert start.engine_gap_sequence == pytest.approx(
            0.01 * max(len(p.chosen.token_ids) for p in sampled(pairs)), abs=1e-3
        )
        assert flat(values) == pytest.approx(expected, abs=1e-4)


def sampled(pairs: Sequence[Pair]) -> list[Pair]:
    """The four of six that are compared: 0, 6/4, 12/4 and 18/4."""
    return [pairs[i] for i in (0, 1, 3, 4)]


@pytest.mark.parametrize("number", range(6))
def test_pairs_compared_are_spread_over_the_round(
    initial: Policy, pairs: list[Pair], tmp_path: Path, number: int
) -> None:
    """One pair falsified: seen where it is one of the four."""
    off = replace(pairs[number], rejected=shifted(pairs[number].rejected, 1.0))
    changed = [*pairs[:number], off, *pairs[number + 1 :]]
    _, start = found_by(learner_of(initial), job_of(initial, changed, DPO, tmp_path / "next"))
    assert start.reference_from == ("learner" if number in (0, 1, 3, 4) else "engine")


def test_without_a_need_there_are_none(job: TrainJob, initial: Policy) -> None:
    learner = learner_of(initial)
    with watched(learner.model) as (digests, scored):
        values, start = reference_logps(learner.model, job, 1e-3, needed=False)
    assert (values, start.reference_from) == ([], "none")
    assert start.engine_gap_token is not None
    assert math.isfinite(start.engine_gap_token)
    assert (digests, scored) == ([initial.digest], [8])


# --- the learner's, and the cache's ---


def test_learner_computes_those_of_another_policy(job: TrainJob, initial: Policy) -> None:
    """In the pairs' order, by the reference's own weights: as a learner that scores it says."""
    learner = learner_of(initial, tokens_per_pass=PAIR_EACH)
    values, start = found_by(learner, job)
    assert start.reference_from == "learner"
    sides = [(p.prompt, answer) for p in job.pairs for answer in (p.chosen, p.rejected)]
    assert flat(values) == pytest.approx(
        [x for row in learner_of(initial).score(job.reference, sides) for x in row], abs=1e-4
    )


def test_second_arm_reads_what_the_first_computed(job: TrainJob, initial: Policy) -> None:
    """Bit for bit, without loading the reference; the pairs may come in another order, and fewer."""
    first, _ = found_by(learner_of(initial), job)
    other = learner_of(initial)
    turned = replace(job, pairs=tuple(reversed(job.pairs[1:])), dpo=DPO.model_copy(update={"beta": 0.5}), seed=3)
    with watched(other.model) as (digests, scored):
        values, start = found_by(other, turned)
    assert start.reference_from == "cache"
    assert job.reference.digest not in digests
    assert scored == [8]  # the comparison with the engine alone
    assert values == list(reversed(first[1:]))


def test_trainings_from_cache_and_from_the_learner_are_the_same(job: TrainJob, initial: Policy, tmp_path: Path) -> None:
    """Bit for bit, through a whole step."""
    gradients, starts = [], []
    for name in ("one", "two"):
        learner = learner_of(initial)
        start, _, policy = result_of(learner, replace(job, out=tmp_path / name))
        gradients.append(gradients_of(learner))
        starts.append((start.reference_from, policy.digest))
    assert [origin for origin, _ in starts] == ["learner", "cache"]
    assert starts[0][1] == starts[1][1]
    assert farthest(*gradients) == 0.0


def test_another_policy_misses(job: TrainJob, initial: Policy, moved: Moved) -> None:
    learner = learner_of(initial)
    first, _ = found_by(learner, job)
    values, start = found_by(learner, replace(job, reference=moved(2)))
    assert start.reference_from == "learner"
    assert max(abs(a - b) for a, b in zip(flat(values), flat(first), strict=True)) > 0.05


def test_another_precision_misses(job: TrainJob, initial: Policy) -> None:
    """What float32 computed does not serve bfloat16, nor the other way round."""
    exact, _ = found_by(learner_of(initial), job)
    rounded, start = found_by(learner_of(initial, dtype="bfloat16"), job)
    assert start.reference_from == "learner"
    assert flat(rounded) != flat(exact)
    for dtype, expected in (("float32", exact), ("bfloat16", rounded)):
        values, start = found_by(learner_of(initial, dtype=dtype), job)
        assert (start.reference_from, values) == ("cache", expected)


def test_another_token_misses_and_the_rest_is_read(job: TrainJob, initial: Policy) -> None:
    """One answer's last token changed: that answer alone is computed, and the others are not computed again."""
    first, _ = found_by(learner_of(initial), job)
    pair = job.pairs[2]
    changed = replace(pair.rejected, token_ids=(*pair.rejected.token_ids[:-1], 300))
    pairs = (*job.pairs[:2], replace(pair, rejected=changed), *job.pairs[3:])
    learner = learner_of(initial)
    with watched(learner.model) as (digests, scored):
        values, start = found_by(learner, replace(job, pairs=pairs))
    assert start.reference_from == "learner"
    assert job.reference.digest in digests
    assert scored == [8, 1]
    assert values[:2] == first[:2] and values[3:] == first[3:]
    assert values[2][0] == first[2][0]
    assert list(values[2][1])[:-1] == pytest.approx(list(first[2][1])[:-1], abs=1e-4)
    assert values[2][1][-1] != first[2][1][-1]


def test_answer_of_several_pairs_is_computed_once(job: TrainJob, initial: Policy) -> None:
    first = job.pairs[0]
    third = replace(job.pairs[1].chosen, prompt_id=first.prompt.id, index=2)
    every = (
        first,
        Pair(first.prompt, first.chosen, third, 1.0, 0.5),
        Pair(first.prompt, third, first.rejected, 0.5, 0.0),
    )
    learner = learner_of(initial)
    with watched(learner.model) as (_, scored):
        values, _ = found_by(learner, replace(job, pairs=every))
    assert scored == [6, 3]
    assert values[0][0] == values[1][0] and values[0][1] == values[2][1] and values[1][1] == values[2][0]


def test_without_a_file_nothing_is_kept(job: TrainJob, initial: Policy, tmp_path: Path) -> None:
    learner = learner_of(initial)
    for _ in range(2):
        _, start = found_by(learner, replace(job, cache=None))
        assert start.reference_from == "learner"
    assert not (tmp_path / "logps.sqlite").exists()


def test_what_is_cached_is_what_was_found(job: TrainJob, initial: Policy) -> None:
    """In float32, under this policy's keys: nothing is rounded on the way into the file."""
    values, _ = found_by(learner_of(initial), job)
    assert job.cache is not None
    from online_dpo.backends.logp_cache import cache_key

    keys = [cache_key(job.reference.digest, "float32", item) for item in items_of(job.pairs)]
    known = LogpCache(job.cache).find(keys)
    rows = [known[key] for key in keys]
    assert list(zip(rows[:6], rows[6:], strict=True)) == values
    assert all(torch.tensor(row, dtype=torch.float32).tolist() == row for row in rows)


def test_damaged_cache_is_one_line(job: TrainJob, initial: Policy) -> None:
    """It ends the run, as other damage in the run folder does, before any step; without it the round trains."""
    assert job.cache is not None
    job.cache.write_bytes(b"no database" * 100)
    learner = learner_of(initial)
    with pytest.raises(RunFolderError, match=r"logps\.sqlite cannot be read .*delete it") as caught:
        result_of(learner, job)
    assert "\n" not in str(caught.value)
    job.cache.unlink()
    assert result_of(learner, job)[0].reference_from == "learner"
