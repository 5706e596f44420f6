"""SPIN: the dataset's answer against the policy's own samples, without a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from offline import Offline, pairs_of, reading, write
from test_loop import HELD_OUT, TRAIN, Killed, experiment, no_fsync, results, with_death  # noqa: F401 - a fixture

from online_dpo.config import Experiment
from online_dpo.errors import DataError
from online_dpo.records import read_candidates, read_pairs, read_verdicts
from online_dpo.seeds import derive_seed
from online_dpo.sources.datasets import read_datasets
from online_dpo.types import Verdict


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def spin(**changes: Any) -> Experiment:
    return experiment(**{"arms": {"spin": {"source": {"spin": "answers.jsonl"}}}, "sampling": {"n": 2}} | changes)


def answers() -> list[dict[str, Any]]:
    """Answers alone, without a rejected one."""
    return [{"prompt": prompt.text, "answer": f"People say {prompt.id}."} for prompt in TRAIN]


def test_the_answer_stands_against_the_current_policys_samples(tmp_path: Path) -> None:
    write(tmp_path / "answers.jsonl", answers())
    world = Offline(tmp_path / "run", spin()).go()
    for index in (1, 2):
        folder = world.folder("spin", index)
        candidates = read_candidates(folder.path / "candidates.parquet")
        assert [c.index for c in candidates] == [0, 1, 2] * 3
        for given, *sampled in zip(candidates[::3], candidates[1::3], candidates[2::3], strict=True):
            assert (given.text, given.logprobs) == (f"People say {given.prompt_id}.", ())
            assert [c.prompt_id for c in sampled] == [given.prompt_id] * 2
            assert [c.seed for c in sampled] == [derive_seed(0, "sample", index, given.prompt_id, i) for i in (0, 1)]
            assert all(len(c.logprobs) == len(c.token_ids) > 0 for c in sampled)
        verdicts = read_verdicts(folder.path / "verdicts.parquet")
        assert verdicts == [Verdict(c.prompt_id, c.index, float(c.index == 0), {"label": "spin"}) for c in candidates]
        pairs = read_pairs(folder.path / "pairs.parquet", {p.id: p for p in TRAIN}, candidates)
        assert [(pair.chosen.index, pair.rejected.index) for pair in pairs] == [(0, 1)] * 3
        metrics = world.metrics()["spin", index]
        assert (metrics["source"], metrics["audit"], metrics["judge"]["verdicts"]) == (None, None, 0)
        assert (metrics["sample"]["candidates"], metrics["sample"]["given"]) == (9, 3)
    loads = [call[1] for call in world.calls if call[0] == "load"]
    assert world.metrics()["spin", 1]["policy"]["digest"] in loads


def test_all_pairs_sets_the_answer_against_every_sample(tmp_path: Path) -> None:
    """Samples among each other are ties."""
    write(tmp_path / "answers.jsonl", answers())
    world = Offline(tmp_path / "run", spin(pairing={"rule": "all_pairs"}, rounds=1)).go()
    assert world.metrics()["spin", 1]["pairs"]["kept"] == 6
    assert world.metrics()["spin", 1]["pairs"]["dropped"] == {"tie": 3}


def test_chosen_answers_of_pairs_serve_and_their_prompts_where_the_runs_have_none(tmp_path: Path) -> None:
    rows = [row | {"prompt": f"Other than {row['prompt']}"} for row in pairs_of(TRAIN[:4])]
    write(tmp_path / "answers.jsonl", rows)
    world = Offline(tmp_path / "run", spin(rounds=1)).go()
    [data] = world.run.datasets.values()
    candidates = read_candidates(world.folder("spin", 1).path / "candidates.parquet")
    own = {row.prompt.id: row for row in data.rows}
    assert {c.prompt_id for c in candidates} <= set(own)
    assert all(c.text == own[c.prompt_id].chosen.text for c in candidates if c.index == 0)
    [(requests,)] = [call for call in world.asked("sample") if call[0][0][0] in own]
    assert len(requests) == 3


def test_held_out_prompts_are_dropped(tmp_path: Path) -> None:
    write(tmp_path / "answers.jsonl", [{"prompt": prompt.text, "answer": "x"} for prompt in (*TRAIN, *HELD_OUT)])
    [data] = read_datasets(spin(), reading(tmp_path)).values()
    assert data.dropped["held_out"] == len(HELD_OUT)


def test_columns_that_hold_no_answer(tmp_path: Path) -> None:
    write(tmp_path / "answers.jsonl", [{"prompt": "a", "reply": "b"}])
    with pytest.raises(DataError, match=r"arm spin: answers\.jsonl: no answers in columns prompt, reply"):
        read_datasets(spin(), reading(tmp_path))


@pytest.mark.parametrize("stage", ["sample", "judge", "train"])
def test_resuming_after_any_death_gives_what_an_uninterrupted_run_gives(tmp_path: Path, stage: str) -> None:
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "answers.jsonl", answers())
    whole = Offline(tmp_path / "whole" / "run", spin()).go()
    world = Offline(tmp_path / "killed" / "run", spin())
    with pytest.raises(Killed):
        with_death(world, "spin", 2, stage, "within")
    assert results(world.reopen().go().root) == results(whole.root)
