"""An arm that trains on a fixed preference dataset: which pairs a round has, whose labels, and what resuming gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from offline import Offline, pairs_of, reading, write
from test_cli import Desk, desk, one_line  # noqa: F401 - desk is a fixture
from test_loop import HELD_OUT, TRAIN, Killed, World, experiment, no_fsync, results, with_death  # noqa: F401 - no_fsync too

from online_dpo.config import Experiment, validate_experiment
from online_dpo.errors import ConfigError, DataError
from online_dpo.prompts import prompts_for_round
from online_dpo.records import read_candidates, read_pairs, read_round_prompts, read_verdicts
from online_dpo.sources.datasets import read_datasets
from online_dpo.types import Verdict


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def offline(source: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    """One arm that reads pairs.jsonl, with the rest of the source's keys in `source`."""
    return experiment(**{"arms": {"offline": {"source": {"dataset": "pairs.jsonl", **(source or {})}}}} | changes)


def others(count: int) -> list[dict[str, Any]]:
    """Pairs of prompts that are not the run's, one prompt with two pairs."""
    rows = [
        {"id": f"r{i}", "prompt": f"Other {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count - 1)
    ]
    return [*rows, rows[0] | {"id": "again", "chosen": "better"}]


def pinned(world: World, arm: str, index: int) -> list[str]:
    found: list[str] = json.loads((world.folder(arm, index).path / "round.json").read_text(encoding="utf-8"))["prompts"]
    return found


# --- which pairs ---


def test_rounds_keep_their_own_prompts_where_each_has_a_pair(tmp_path: Path) -> None:
    """The prompts of every other arm in that round, with their pair's texts and the dataset's labels."""
    write(tmp_path / "pairs.jsonl", pairs_of([*TRAIN, *HELD_OUT]))
    arms = {"on_policy": {}, "offline": {"source": {"dataset": "pairs.jsonl"}}}
    world = Offline(tmp_path / "run", experiment(arms=arms)).go()
    for index in (1, 2):
        assert pinned(world, "offline", index) == pinned(world, "on_policy", index)
        folder = world.folder("offline", index)
        candidates = read_candidates(folder.path / "candidates.parquet")
        assert [(c.prompt_id, c.index, c.logprobs) for c in candidates] == [
            (prompt_id, place, ()) for prompt_id in pinned(world, "offline", index) for place in (0, 1)
        ]
        assert [c.text for c in candidates[:2]] == [
            f"Yes, {candidates[0].prompt_id}.",
            f"No, never {candidates[0].prompt_id}.",
        ]
        verdicts = read_verdicts(folder.path / "verdicts.parquet")
        assert verdicts == [Verdict(c.prompt_id, c.index, 1.0 - c.index, {"label": "dataset"}) for c in candidates]
        pairs = read_pairs(folder.path / "pairs.parquet", {p.id: p for p in TRAIN}, candidates)
        assert [(pair.chosen.index, pair.rejected.index, pair.margin) for pair in pairs] == [(0, 1, 1.0)] * 3


def test_nothing_is_sampled_and_nobody_is_asked_but_on_held_out_prompts(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", pairs_of(TRAIN))
    world = Offline(tmp_path / "run", offline()).go()
    held_out = [prompt.id for prompt in HELD_OUT]
    assert [[prompt_id for prompt_id, _ in requests] for (requests,) in world.asked("sample")] == [held_out] * 3
    metrics = world.metrics()["offline", 2]
    assert metrics["source"] is None
    assert metrics["audit"] is None
    assert (metrics["sample"]["tokens"], metrics["sample"]["given"], metrics["judge"]["verdicts"]) == (0, 6, 0)
    assert all(call[3] is None for call in world.asked("train"))  # no policy's stored log-probs are any reference's
    assert all(
        not answer.logprobs
        for call in world.asked("train")
        for pair in call[4]
        for answer in (pair.chosen, pair.rejected)
    )


def test_rows_are_dealt_by_the_seed_without_replacement(tmp_path: Path) -> None:
    """Three a round of seven rows: rounds 1 and 2 share none, round 3 takes the last one and begins anew."""
    write(tmp_path / "pairs.jsonl", others(7))
    world = Offline(tmp_path / "run", offline(rounds=3, seeds=[0, 1])).go()
    [data] = world.run.datasets.values()
    dealt = [row.prompt for row in data.rows]
    first = [pinned(world, "offline", index) for index in (1, 2, 3)]
    for index in (1, 2, 3):
        assert first[index - 1] == [prompt.id for prompt in prompts_for_round(dealt, 0, index, 3)]
    assert len(set(first[0] + first[1] + first[2][:1])) == 7
    other = json.loads((world.run.store.round("offline", 1, 1).path / "round.json").read_text(encoding="utf-8"))
    assert other["prompts"] != first[0]
    stored = read_round_prompts(world.folder("offline", 1).path)  # in no other file of the run
    assert list(stored.values()) == list(prompts_for_round(dealt, 0, 1, 3))
    candidates = read_candidates(world.folder("offline", 1).path / "candidates.parquet")
    texts = {row.prompt.id: [row.chosen.text, row.rejected.text] for row in data.rows if row.rejected is not None}
    assert [[a.text, b.text] for a, b in zip(candidates[::2], candidates[1::2], strict=True)] == [
        texts[p] for p in first[0]
    ]


def test_prompts_can_be_asked_for_where_some_have_no_pair(tmp_path: Path) -> None:
    """`auto` would take rows; of the round's three prompts those without a pair bring none, and are counted."""
    write(tmp_path / "pairs.jsonl", pairs_of(TRAIN[:6]))
    auto = Offline(tmp_path / "auto" / ".." / "run", offline(name="auto"))
    assert pinned(auto.go(), "offline", 1)[0] not in [prompt.id for prompt in TRAIN]
    world = Offline(tmp_path / "asked", offline({"match": "prompts"}, rounds=3)).go()
    rounds = [world.metrics()["offline", index] for index in (1, 2, 3)]
    assert (
        sum(row["sample"]["without_row"] for row in rounds[:2]) + (TRAIN[6].id in pinned(world, "offline", 3)[:1]) == 1
    )
    for row, index in zip(rounds, (1, 2, 3), strict=True):
        assert row["pairs"]["kept"] == 3 - row["sample"]["without_row"]
        assert row["sample"]["without_row"] == (TRAIN[6].id in pinned(world, "offline", index))


def test_a_prompts_several_pairs_are_drawn_by_the_seed(tmp_path: Path) -> None:
    rows = [row | {"chosen": f"Yes {i}"} for i in range(20) for row in pairs_of(TRAIN[:3])]
    write(tmp_path / "pairs.jsonl", rows + pairs_of(TRAIN[3:]))
    world = Offline(tmp_path / "run", offline(seeds=[0, 1], rounds=4)).go()

    def texts(seed: int, index: int) -> dict[str, str]:
        path = world.run.store.round("offline", seed, index).path / "candidates.parquet"
        return {c.prompt_id: c.text for c in read_candidates(path) if c.index == 0}

    drawn = [
        text for seed in (0, 1) for index in (1, 2, 3, 4) for p, text in texts(seed, index).items() if p < "train-3"
    ]
    assert len(drawn) >= 8
    assert len(set(drawn)) > len(drawn) / 2


# --- whose labels ---


def test_relabelled_by_the_arms_judge(tmp_path: Path) -> None:
    """The judge likes length: the dataset's rejected answer becomes the chosen one; the judge is audited."""
    write(tmp_path / "pairs.jsonl", pairs_of(TRAIN))
    world = Offline(tmp_path / "run", offline({"relabel": True}, rounds=1, audit={"prompts": 2})).go()
    folder = world.folder("offline", 1)
    candidates = read_candidates(folder.path / "candidates.parquet")
    assert [v.score for v in read_verdicts(folder.path / "verdicts.parquet") if isinstance(v, Verdict)] == [
        len(c.text) for c in candidates
    ]
    pairs = read_pairs(folder.path / "pairs.parquet", {p.id: p for p in TRAIN}, candidates)
    assert [(pair.chosen.index, pair.rejected.index) for pair in pairs] == [(1, 0)] * 3
    metrics = world.metrics()["offline", 1]
    assert metrics["judge"]["verdicts"] == 6
    assert metrics["audit"]["prompts"] == 2


def test_labels_are_not_audited_and_max_pairs_is_the_budget(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", pairs_of(TRAIN))
    world = Offline(tmp_path / "run", offline(rounds=1, audit={"prompts": 2}, pairing={"max_pairs": 2})).go()
    metrics = world.metrics()["offline", 1]
    assert metrics["audit"] is None
    assert (metrics["pairs"]["kept"], metrics["pairs"]["dropped"]) == (2, {"over_budget": 1})


def test_arms_that_differ_in_their_loss_read_the_rows_once(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", pairs_of(TRAIN))
    source = {"source": {"dataset": "pairs.jsonl"}}
    arms = {
        "a": source,
        "b": {**source, "dpo": {"beta": 0.5}},
        "c": {"source": {"dataset": "pairs.jsonl", "relabel": True}},
    }
    world = Offline(tmp_path / "run", experiment(arms=arms, rounds=1)).go()
    assert len(world.run.datasets) == 1
    assert world.metrics()["b", 1]["reused"] == ["sample", "judge", "pair"]
    assert world.metrics()["c", 1]["reused"] == ["sample"]


# --- resuming ---


@pytest.mark.parametrize(
    ("rows", "stage"),
    [("own", "sample"), ("own", "train"), ("others", "sample"), ("others", "judge"), ("others", "close")],
)
def test_resuming_after_any_death_gives_what_an_uninterrupted_run_gives(tmp_path: Path, stage: str, rows: str) -> None:
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "pairs.jsonl", pairs_of(TRAIN) if rows == "own" else others(7))
    whole = Offline(tmp_path / "whole" / "run", offline()).go()
    world = Offline(tmp_path / "killed" / "run", offline())
    with pytest.raises(Killed):
        with_death(world, "offline", 2, stage, "within")
    assert results(world.reopen().go().root) == results(whole.root)


# --- what is wrong is known before anything is sampled ---


@pytest.mark.parametrize(
    ("rows", "source", "changes", "error", "message"),
    [
        (others(2), {}, {}, DataError, r"jsonl has 2 usable rows \(dropped: none\), but prompts\.per_round is 3"),
        (others(5), {"match": "prompts"}, {}, DataError, "none of them for a training prompt: set match: rows"),
        (pairs_of(HELD_OUT), {}, {}, DataError, r"arm offline: pairs\.jsonl: no usable row \(dropped: 3 held out\)"),
        ([{"prompt": "a", "good": "b"}], {}, {}, DataError, "arm offline: .* no preference pairs in columns"),
        (others(5), {}, {"pairing": {"min_margin": 2}}, ConfigError, "arm offline: pairing.min_margin is 2, and"),
    ],
)  # fmt: skip
def test_errors(
    tmp_path: Path, rows: list[dict[str, Any]], source: dict[str, Any], changes: dict[str, Any],
    error: type[Exception], message: str,
) -> None:  # fmt: skip
    write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(error, match=message):
        read_datasets(offline(source, **changes), reading(tmp_path))


def test_a_margin_of_the_judges_is_no_fault(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", pairs_of(TRAIN))
    assert read_datasets(offline({"relabel": True}, pairing={"min_margin": 2}), reading(tmp_path))


def test_importance_weights_want_a_policys_samples() -> None:
    for source in ({"dataset": "x"}, {"spin": "x"}):
        with pytest.raises(ConfigError, match=r"importance_clip .* a dataset's have none"):
            validate_experiment(
                {
                    **experiment().model_dump(mode="json"),
                    "arms": {"a": {"source": source, "dpo": {"importance_clip": 2}}},
                },
                "test",
            )


def spec_of(desk: Desk, **source: Any) -> Path:  # noqa: F811
    return desk.write(arms={"offline": {"source": {"dataset": "pairs.jsonl", **source}}})


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_wrong_path_is_one_line(desk: Desk, command: str) -> None:  # noqa: F811
    write(desk.folder / "pears.jsonl", others(5))
    message = one_line(desk(command, spec_of(desk)))
    assert message == "arm offline: no preference pairs at 'pairs.jsonl' (did you mean 'pears.jsonl'?)"
    assert not (desk.folder / "runs").exists()


def test_check_says_what_is_used(desk: Desk) -> None:  # noqa: F811
    write(desk.folder / "pairs.jsonl", [*others(5), {"prompt": "a", "chosen": "b", "rejected": "b"}])
    result = desk("check", spec_of(desk))
    assert result.exit_code == 0, result.stderr
    assert "dataset pairs.jsonl: 5 rows, dropped: 1 identical\n" in result.stdout


def test_a_dataset_that_changed_is_refused_on_resume_and_on_run(desk: Desk) -> None:  # noqa: F811
    from fakes import FakeLearner

    rows = others(7)
    write(desk.folder / "pairs.jsonl", rows)
    desk.learner = lambda calls: FakeLearner(calls, stop=lambda policy_id: policy_id.endswith("02"))
    assert desk("run", spec_of(desk)).exit_code == 1
    manifest = json.loads((desk.root / "manifest.json").read_text(encoding="utf-8"))
    [record] = manifest["datasets"].values()
    assert (record["path"], record["rows"]) == ("pairs.jsonl", 7)

    write(desk.folder / "pairs.jsonl", [*rows[:-1], rows[-1] | {"rejected": "worse"}])
    desk.learner = FakeLearner
    for command in (("resume", desk.root), ("run", desk.file)):
        message = one_line(desk(*command))
        assert message.endswith(
            "the dataset pairs.jsonl is not the one that the run began with; restore it, or start a run under another "
            "name"
        )
    write(desk.folder / "pairs.jsonl", rows)
    resumed = desk("resume", desk.root)
    assert resumed.exit_code == 0, resumed.stderr
    assert yaml.safe_load((desk.root / "experiment.yaml").read_text(encoding="utf-8"))["prompts"]["template"] is None
