"""Held-out human pairs: read and tokenised once, ranked by policies; which share is right, by hand and by a model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer
from fakes import FakeLearner, fake_prompt
from test_loop import HELD_OUT, TRAIN, Killed, World, experiment, results, with_death

from online_dpo.answers import AnswerEncoder
from online_dpo.dataset_rows import Reading, read_dataset
from online_dpo.errors import DataError, RunFolderError
from online_dpo.human_pairs import HumanPairs, load_human_pairs, pairs_digest, read_given_pairs, write_given_pairs
from online_dpo.models import ResolvedModel
from online_dpo.prompts import PromptSet
from online_dpo.runs import Resolved, open_or_create, stored_human_pairs
from online_dpo.scored_records import RankedPair, read_human_pairs, write_human_pairs
from online_dpo.source_spec import DatasetSpec
from online_dpo.types import Candidate, Message, Pair, Policy, Prompt

END = 2


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def reading(longest: int | None = None, system: str | None = None, train: Sequence[Prompt] = ()) -> Reading:
    """A model of one token a byte that reads so many; the run trains on these prompts."""
    encoder = AnswerEncoder(byte_tokenizer(), (END,))
    return Reading(encoder, train, held_out=(), longest_prompt=99, longest=longest, system=system)


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> DatasetSpec:
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return DatasetSpec(path=str(file))


# --- reading ---


def test_pairs_are_tokenised_as_the_policy_would_see_them(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        [
            {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
            {"prompt": "Why?", "chosen": "Because.", "rejected": "So."},
            {"prompt": "How?", "chosen": "Thus.", "rejected": "So."},
        ],
    )
    found = load_human_pairs(spec, reading())
    assert [pair.chosen.text for pair in found.pairs] == ["So.", "Because.", "Thus."]
    for pair in found.pairs:
        encoder = reading().encoder
        assert pair.prompt.token_ids == encoder.prompt(pair.prompt.messages)
        for answer in (pair.chosen, pair.rejected):
            assert answer.token_ids == encoder.answer(pair.prompt.messages, answer.text)
            assert answer.token_ids[-1] == END
            assert answer.logprobs == ()
    first, second, third = (pair.prompt.id for pair in found.pairs)
    assert first == second != third  # pairs of one prompt count as one in the intervals
    assert sum((found.dropped or {}).values()) == 0


def test_what_the_model_cannot_read_is_left_out_and_counted(tmp_path: Path) -> None:
    """One token a byte: 4 for the prompt, a space, the answer, the end. The longer of 3 and 5 bytes: 11 tokens."""
    rows = [
        {"prompt": "Why?", "chosen": "yes", "rejected": "maybe"},
        {"prompt": "Why?", "chosen": "as it says", "rejected": "no"},
        {"prompt": "Why?", "chosen": "same", "rejected": "same"},
        {"prompt": "Why?", "chosen": "a</s>b", "rejected": "no"},
    ]
    found = load_human_pairs(write(tmp_path, rows), reading(11))
    assert [pair.chosen.text for pair in found.pairs] == ["yes"]
    assert {k: v for k, v in (found.dropped or {}).items() if v} == {"too_long": 1, "identical": 1, "has_end": 1}
    with pytest.raises(DataError, match=r"evaluation\.pairs: .* no pair to measure by .*2 too long"):
        load_human_pairs(write(tmp_path, rows), reading(10))


def test_limit_bounds_them_and_nothing_is_nothing(tmp_path: Path) -> None:
    spec = write(tmp_path, [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(9)])
    assert len(load_human_pairs(spec.model_copy(update={"limit": 4}), reading()).pairs) == 4
    assert load_human_pairs(None, reading()) == HumanPairs()
    with pytest.raises(DataError, match="no preference pairs at"):
        load_human_pairs(DatasetSpec(path=str(tmp_path / "pears.jsonl")), reading())


def test_pairs_of_prompts_that_the_run_trains_on_are_left_out_before_any_is_drawn(tmp_path: Path) -> None:
    """By what is asked, whatever system message stands before it: of ten, six are left, and four of them drawn."""
    rows = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(10)]
    train = [Prompt(str(i), (Message("system", "s"), Message("user", f"{i}?")), (1,)) for i in range(2)]
    own = read_dataset(write(tmp_path, rows[2:4]), reading(), answers_alone=False)
    found = load_human_pairs(write(tmp_path, rows).model_copy(update={"limit": 4}), reading(train=train), [own])
    assert (found.dropped or {})["trained_on"] == 4
    assert len(found.pairs) == 4
    assert not {pair.prompt.text for pair in found.pairs} & {"0?", "1?", "2?", "3?"}
    with pytest.raises(DataError, match="dropped: 2 trained on"):
        load_human_pairs(write(tmp_path, rows[:2]), reading(train=train))


def test_the_experiments_system_message_stands_before_plain_prompts(tmp_path: Path) -> None:
    """A model without a chat template has no place for one, and says so; the prompt's id stays the question's."""
    spec = write(tmp_path, [{"prompt": "Why?", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="no chat template"):
        load_human_pairs(spec, reading(system="Be brief."))
    told = reading(system="Be brief.")
    told.encoder.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (pair,) = load_human_pairs(spec, told).pairs
    assert [message.role for message in pair.prompt.messages] == ["system", "user"]
    assert pair.prompt.id == load_human_pairs(spec, reading()).pairs[0].prompt.id


def test_the_runs_file_keeps_them_whole(tmp_path: Path) -> None:
    rows = [{"prompt": "é\n日?", "chosen": "🌳 ja", "rejected": '"no"'}]
    pairs = load_human_pairs(write(tmp_path, rows), reading()).pairs
    write_given_pairs(tmp_path / "f.parquet", pairs)
    assert read_given_pairs(tmp_path / "f.parquet") == pairs
    assert pairs_digest(read_given_pairs(tmp_path / "f.parquet")) == pairs_digest(pairs)


def test_ranked_pairs_keep_every_digit(tmp_path: Path) -> None:
    ranked = [RankedPair("p", -1 / 3, -2.0, -(2.0**-60), -4.0)]
    write_human_pairs(tmp_path / "f.parquet", ranked)
    assert read_human_pairs(tmp_path / "f.parquet") == ranked


# --- the stage ---


def given(prompt_id: str, chosen: Sequence[int], rejected: Sequence[int]) -> Pair:
    answers = [
        Candidate(prompt_id, index, "", tuple(tokens), (), "stop", 0) for index, tokens in enumerate((chosen, rejected))
    ]
    return Pair(fake_prompt(prompt_id), answers[0], answers[1], 1.0, 0.0)


PAIRS = (given("a", (1, 2), (3,)), given("b", (4,), (5,)), given("c", (6,), (7, 7)), given("d", (8,), (9,)))
LOGPROBS = {
    "initial": {(1, 2): -4.0, (3,): -6.0, (4,): -3.0, (5,): -2.0, (6,): -5.0, (7, 7): -1.0, (8,): -2.0, (9,): -2.0},
    "round_01": {(1, 2): -9.0, (3,): -5.0, (4,): -2.0, (5,): -3.0, (6,): -4.0, (7, 7): -2.0, (8,): -3.0, (9,): -3.0},
}


class Ranks(FakeLearner):
    """Sums of `LOGPROBS` for the answers of `PAIRS`, spread over their tokens; others as the fake's."""

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        found = super().score(policy, items)
        known = LOGPROBS.get(policy.id.rpartition("/")[2], {})
        for place, (_, answer) in enumerate(items):
            if not answer.logprobs:
                found[place] = [known[answer.token_ids] / len(answer.token_ids)] * len(answer.token_ids)
        return found


def ranking(root: Path, **changes: Any) -> World:
    world = World(root, experiment(rounds=1, **changes), learner=Ranks)
    world.run.human_pairs = PAIRS
    return world


def test_both_accuracies_by_hand(tmp_path: Path) -> None:
    """Chosen less rejected: under π₀ 2, −1, −4, 0; under π −4, 1, −2, 0; their difference −6, 2, 2, 0.

    Ranking accuracy: π₀ (1 + 0 + 0 + ½)/4, π (0 + 1 + 0 + ½)/4, both 0.375; implicit accuracy (0 + 1 + 1 + ½)/4 =
    0.625. Wilson at n = 4, z² = 3.8415: centre (p + z²/8)/(1 + z²/4), half √(z²(p(1−p)/4 + z²/64))/(1 + z²/4).
    """
    world = ranking(tmp_path / "run", arms={"a": {}}).go()
    start, end = (world.metrics()["a", index]["held_out"]["human_pairs"] for index in (0, 1))
    z2 = 1.959964**2
    centre, half = (0.625 + z2 / 8) / (1 + z2 / 4), (z2 * (0.625 * 0.375 / 4 + z2 / 64)) ** 0.5 / (1 + z2 / 4)
    assert start["n"] == end["n"] == 4
    assert start["ranking_accuracy"]["mean"] == end["ranking_accuracy"]["mean"] == 0.375
    assert start["implicit_accuracy"] is None
    assert end["implicit_accuracy"] == pytest.approx({"mean": 0.625, "low": centre - half, "high": centre + half})


def test_the_initial_policy_ranks_once_for_all_arms_and_seeds(tmp_path: Path) -> None:
    """Its sums come from round 0's file ever after; each other policy scores the eight answers once."""
    world = ranking(tmp_path / "run", seeds=[0, 1]).go()
    asked = [policy for policy, ids in world.asked("score") if len(ids) == 8]
    trained = {row["policy"]["digest"] for row in world.metrics().values()} - {world.run.initial.digest}
    assert asked.count(world.run.initial.digest) == 1
    assert trained < set(asked)
    assert len(asked) == len(set(asked)) == 3  # π₀, and what round 1 trained at each seed; both arms train the same
    assert "human_pairs" in world.metrics()["self_offline", 1]["reused"]
    first = read_human_pairs(world.folder("on_policy", 1).path / "human_pairs.parquet")[0]
    assert first == RankedPair("a", -9.0, -5.0, -4.0, -6.0)


def test_without_pairs_there_is_no_stage(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(rounds=1, arms={"a": {}})).go()
    assert world.metrics()["a", 1]["held_out"]["human_pairs"] is None
    assert not (world.folder("a", 1).path / "human_pairs.parquet").exists()


def test_pairs_of_one_prompt_do_not_narrow_the_interval(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(rounds=1, arms={"a": {}}), learner=Ranks)
    world.run.human_pairs = (PAIRS[0], PAIRS[0], PAIRS[1], PAIRS[1])
    once = World(tmp_path / "once" / "run", experiment(rounds=1, arms={"a": {}}), learner=Ranks)
    once.run.human_pairs = PAIRS[:2]
    found, expected = (w.go().metrics()["a", 1]["held_out"]["human_pairs"] for w in (world, once))
    assert found["n"] == 4
    assert found["ranking_accuracy"] == expected["ranking_accuracy"]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("index", "moment"),
    [(1, "within"), *(pytest.param(*case, marks=SLOW) for case in ((0, "within"), (0, "after"), (1, "before")))],
)
def test_resuming_around_the_ranking_gives_what_an_uninterrupted_run_gives(
    tmp_path: Path, index: int, moment: str
) -> None:
    whole = results(ranking(tmp_path / "whole" / "run").go().root)
    with pytest.raises(Killed):
        with_death(ranking(tmp_path / "run"), "on_policy", index, "human_pairs", moment)
    assert results(ranking(tmp_path / "run").go().root) == whole


# --- the run folder ---


def resolved(folder: Path, pairs: tuple[Pair, ...]) -> Resolved:
    spec = experiment(output=str(folder))
    found = HumanPairs(pairs, {"too_long": 3}) if pairs else HumanPairs()
    model = ResolvedModel("m", folder, "digest", "folder")
    return Resolved(spec, folder, model, PromptSet(TRAIN, HELD_OUT, {}, False), {}, human_pairs=found)


def test_a_run_keeps_its_pairs_and_is_refused_with_others(tmp_path: Path) -> None:
    """As they were tokenised when it began; in the manifest how many, what was left out, and their digest."""
    store = open_or_create(resolved(tmp_path, PAIRS))
    assert stored_human_pairs(store) == PAIRS
    assert store.manifest["human_pairs"] == {"pairs": 4, "dropped": {"too_long": 3}, "digest": pairs_digest(PAIRS)}
    assert stored_human_pairs(open_or_create(resolved(tmp_path, PAIRS))) == PAIRS
    for others in (PAIRS[:3], ()):
        with pytest.raises(RunFolderError, match=r"pairs of evaluation\.pairs are not those that the run began"):
            open_or_create(resolved(tmp_path, others))


def test_a_changed_file_of_pairs_stops_the_run(tmp_path: Path) -> None:
    store = open_or_create(resolved(tmp_path, PAIRS))
    write_given_pairs(store.root / "human_pairs.parquet", PAIRS[:2])
    with pytest.raises(RunFolderError, match=r"human_pairs\.parquet was changed after the run began"):
        stored_human_pairs(store)


def test_a_run_without_pairs_has_no_file(tmp_path: Path) -> None:
    store = open_or_create(resolved(tmp_path, ()))
    assert stored_human_pairs(store) == ()
    assert not (store.root / "human_pairs.parquet").exists()
