"""The stages that judge: cache, budget, judges that only compare, judges that ask the policy; with fakes for models."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_loop import HELD_OUT, TRAIN, Killed, World, experiment, results

from online_dpo.config import ComparingSpec, JudgeSpec
from online_dpo.errors import ConfigError, JudgeError, RunFolderError
from online_dpo.judging import Judge, VerdictCache, load_judge
from online_dpo.models import ResolvedModel
from online_dpo.prompts import PromptSet
from online_dpo.records import read_held_out, read_verdicts
from online_dpo.runs import Resolved, check_judges, open_or_create
from online_dpo.types import Verdict

MODULE = '''
from online_dpo.judging import LiveModel, Opinion, PairwiseJudge, PointwiseJudge

class Longer(PairwiseJudge):
    """0.75 for the longer answer, ½ for equal ones; counts its calls."""
    calls = 0
    def prefer(self, prompt, first, second):
        Longer.calls += 1
        difference = len(first.text) - len(second.text)
        return 0.5 if not difference else 0.75 if difference > 0 else 0.25

class Dear(PointwiseJudge):
    """One unit of cost a call; dies at a call number when told so."""
    each_alone = True
    calls, unpaid, die_at = 0, 0, None
    def score(self, prompt, candidates):
        Dear.calls += 1
        if Dear.calls == Dear.die_at:
            raise Dear.death()
        self.unpaid += 1
        return [Opinion(len(c.text), {"even": len(c.text) % 2 == 0}) for c in candidates]
    def ledger(self):
        paid, self.unpaid = self.unpaid, 0
        return {"calls": paid, "cost": float(paid)} if paid else {}

class Own(PointwiseJudge):
    uses_policy = True
    def attach(self, model):
        self.model = model
    def score(self, prompt, candidates):
        rows = self.model.score([prompt.messages] * len(candidates), [[c.text] for c in candidates])
        return [row[0] for row in rows]
'''


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    (folder / "stage_judges.py").write_text(MODULE, encoding="utf-8")
    return folder


@pytest.fixture
def judges(beside: Path) -> Iterator[Any]:
    """The judges' module, counters at zero."""
    check_judges(experiment(judge="stage_judges:Longer"), beside)
    import stage_judges  # type: ignore[import-not-found]

    stage_judges.Longer.calls = stage_judges.Dear.calls = 0
    stage_judges.Dear.die_at, stage_judges.Dear.death = None, Killed
    yield stage_judges


def world(root: Path, beside: Path, **changes: Any) -> World:
    made = World(root, experiment(**{"arms": {"a": {}}, "rounds": 1, **changes}), judge_folders=(beside,))
    made.run.cache = VerdictCache(root / "verdicts.sqlite")
    return made


def test_a_judge_that_compares_measures_against_the_initial_policys_answers(
    tmp_path: Path, beside: Path, judges: Any
) -> None:
    """Round 0 is ½ throughout, unasked. Round 1: 0.75, 0.25 or ½ by length against round 0's answer to the prompt."""
    run = world(tmp_path / "run", beside, judge="stage_judges:Longer").go()
    before, after = (read_held_out(run.folder("a", index).path / "held_out.parquet") for index in (0, 1))
    assert [row.score for row in before] == [0.5] * len(HELD_OUT)
    expected = []
    for old, new in zip(before, after, strict=True):
        difference = len(new.candidate.text) - len(old.candidate.text)
        expected.append(0.5 if not difference else 0.75 if difference > 0 else 0.25)
    assert [row.score for row in after] == expected
    assert any(value != 0.5 for value in expected)
    assert run.metrics()["a", 1]["held_out"]["reward_change"]["mean"] == pytest.approx(
        sum(expected) / len(expected) - 0.5
    )
    assert "against" in run.folder("a", 1).done("evaluate").inputs  # type: ignore[union-attr]


def test_another_pairing_asks_nobody_again(tmp_path: Path, beside: Path, judges: Any) -> None:
    """The cache may be shared by runs: a second run that pairs differently has every verdict of round 1 on disk."""
    first = world(tmp_path / "one", beside, judge="stage_judges:Dear").go()
    cost = judges.Dear.calls
    assert cost == 3 + 2 * len(HELD_OUT)
    second = world(tmp_path / "two", beside, judge="stage_judges:Dear", pairing={"rule": "all_pairs"})
    second.run.cache = VerdictCache(tmp_path / "one" / "verdicts.sqlite")
    second.go()
    assert second.metrics()["a", 1]["judge"]["ledger"] == {"asked": 0, "cached": 9}
    assert first.metrics()["a", 1]["judge"]["ledger"] == {"asked": 9, "cached": 0, "calls": 3, "cost": 3.0}
    # Only round 1's held-out answers are new: another pairing trained another policy.
    assert judges.Dear.calls == cost + len(HELD_OUT)


@pytest.mark.parametrize("call", [1, 3, 4, 5, 7, 9])
def test_a_death_while_judging_pays_for_nothing_twice(tmp_path: Path, beside: Path, judges: Any, call: int) -> None:
    """3 + 3 + 3 calls, one a prompt. The process dies in call k; k − 1 are kept, so the two lives make 9 + 1 calls."""
    whole = world(tmp_path / "whole" / "run", beside, judge="stage_judges:Dear").go()
    assert judges.Dear.calls == 9
    judges.Dear.calls, judges.Dear.die_at = 0, call
    with pytest.raises(Killed):
        world(tmp_path / "cut" / "run", beside, judge="stage_judges:Dear").go()
    again = world(tmp_path / "cut" / "run", beside, judge="stage_judges:Dear").go()
    assert judges.Dear.calls == 9 + 1
    assert results(again.root) == results(whole.root)
    assert again.run.cache is not None
    assert again.run.cache.spent()["calls"] == 9


def test_a_budget_ends_the_run_and_a_raised_one_goes_on(tmp_path: Path, beside: Path, judges: Any) -> None:
    with pytest.raises(JudgeError, match=r"budget is used up: cost 5 of 5.*raise judge_budget\.cost"):
        world(tmp_path / "run", beside, judge="stage_judges:Dear", judge_budget={"cost": 5}).go()
    assert judges.Dear.calls == 5
    again = world(tmp_path / "run", beside)
    with pytest.raises(JudgeError, match="budget is used up"):
        again.go()
    assert judges.Dear.calls == 5
    again.run.store.take_experiment(
        experiment(arms={"a": {}}, rounds=1, judge="stage_judges:Dear", judge_budget={"cost": 100})
    )
    world(tmp_path / "run", beside).go()
    assert judges.Dear.calls == 9


def test_details_are_stored_and_their_means_reported(tmp_path: Path, beside: Path, judges: Any) -> None:
    run = world(tmp_path / "run", beside, judge="stage_judges:Dear").go()
    verdicts = read_verdicts(run.folder("a", 1).path / "verdicts.parquet")
    even = [float(verdict.details["even"] or 0) for verdict in verdicts if isinstance(verdict, Verdict)]
    assert len(even) == 9
    assert run.metrics()["a", 1]["judge"]["details"] == {"even": pytest.approx(sum(even) / 9)}


class Tokens:
    """A tokenizer of one token a character, without a chat template."""

    bos_token_id = eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Sequence[int]]:
        return {"input_ids": [ord(letter) % 251 for letter in text or " "]}


def test_a_judge_that_asks_the_policy_finds_it_in_the_engine(tmp_path: Path, beside: Path, judges: Any) -> None:
    """Just before the engine scores for the judge, it was given the round's source; the stage names that policy."""
    from online_dpo.live_model import EngineModel

    evaluation = {"judge": "judges.length:LengthJudge"}
    run = world(tmp_path / "run", beside, rounds=2, judge="stage_judges:Own", evaluation=evaluation)
    run.run.live_model = lambda: EngineModel(run.run.engine, Tokens(), 10**6)
    run.go()
    loads = [number for number, call in enumerate(run.calls) if call[0] == "engine score"]
    held = {[call for call in run.calls[:number] if call[0] == "load"][-1][1] for number in loads}
    sources = {run.metrics()["a", index]["source"]["digest"] for index in (1, 2)}
    assert held == sources
    inputs = [run.folder("a", index).done("judge").inputs["policy"] for index in (1, 2)]  # type: ignore[union-attr]
    assert set(inputs) == sources


def test_a_judge_that_asks_the_policy_cannot_measure_it(beside: Path, judges: Any) -> None:
    with pytest.raises(ConfigError, match=r"name another judge in evaluation\.judge"):
        check_judges(experiment(judge="stage_judges:Own"), beside)


def test_every_round_audits_its_judge_on_a_sample(tmp_path: Path, beside: Path, judges: Any) -> None:
    """Two of three prompts, three candidates each: 6 pairs. "Longer" is never intransitive, and both orders agree;
    against a judge of length (characters) it agrees on every pair: κ = 1."""
    spec = {"prompts": 2, "against": {"use": "judges.length:LengthJudge", "unit": "characters"}}
    run = world(tmp_path / "run", beside, judge="stage_judges:Longer", audit=spec).go()
    stored = json.loads((run.folder("a", 1).path / "audit.json").read_text(encoding="utf-8"))
    assert (stored["prompts"], stored["pairs"], stored["kind"]) == (2, 6, "candidates")
    assert stored["flips"]["mean"] == 0.0
    figures = run.metrics()["a", 1]["audit"]
    assert figures["prompts"] == 2
    assert figures["kappa"]["mean"] == 1.0
    assert figures["flips"]["mean"] == 0.0
    assert figures["intransitive"] is None or figures["intransitive"]["mean"] == 0.0
    assert figures["longest_first_by_chance"] == pytest.approx(1 / 3)
    # The round's own comparisons are on disk already: the audit asked nobody a second time.
    assert figures["ledger"].get("asked", 0) == 0


def test_no_audit_where_none_is_wanted(tmp_path: Path, beside: Path, judges: Any) -> None:
    run = world(tmp_path / "run", beside, judge="stage_judges:Longer").go()
    assert run.metrics()["a", 1]["audit"] is None
    assert not (run.folder("a", 1).path / "audit.json").exists()


def test_a_key_that_changes_no_verdict_may_change_within_a_run(tmp_path: Path, beside: Path) -> None:
    """`pace` is neutral: the run goes on with the new value. `extra` is not: the run is refused, with the key named."""
    (beside / "paced_judges.py").write_text(
        "from judges.length import LengthJudge\n"
        "class Paced(LengthJudge):\n"
        "    neutral_params = ('pace',)\n"
        "    def __init__(self, pace=1, extra=1):\n"
        "        super().__init__()\n",
        encoding="utf-8",
    )

    def resolved(**params: Any) -> Resolved:
        spec = experiment(judge={"use": "paced_judges:Paced", **params}, output=str(tmp_path), name="run")
        model = ResolvedModel("m", beside, "digest", "folder")
        return Resolved(spec, beside, model, PromptSet(TRAIN, HELD_OUT, {}, False), check_judges(spec, beside))

    open_or_create(resolved(pace=1))
    assert open_or_create(resolved(pace=8)).experiment.judge.params == {"pace": 8}
    with pytest.raises(RunFolderError, match=r"differs in judge\.extra"):
        open_or_create(resolved(pace=8, extra=2))
    assert open_or_create(resolved(pace=8)).experiment.judge.params == {"pace": 8}


def test_a_judge_whose_scores_are_relative_measures_by_comparison(tmp_path: Path, beside: Path) -> None:
    """A panel scores within a prompt alone. On held-out prompts it sees both answers: here the longer one wins."""
    members = [{"use": "judges.length:LengthJudge", "unit": unit} for unit in ("characters", "characters")]
    run = world(tmp_path / "run", beside, judge={"use": "judges.panel:PanelJudge", "judges": members}).go()
    before, after = (read_held_out(run.folder("a", index).path / "held_out.parquet") for index in (0, 1))
    lengths = [(len(old.candidate.text), len(new.candidate.text)) for old, new in zip(before, after, strict=True)]
    assert [row.score for row in before] == [0.5] * len(HELD_OUT)
    assert [row.score for row in after] == [0.5 if new == old else float(new > old) for old, new in lengths]
    assert any(new != old for old, new in lengths)


def test_a_budget_that_cannot_hold_is_refused_before_anybody_is_asked(tmp_path: Path, beside: Path) -> None:
    """An LLM judge without prices cannot count its cost; calls and tokens it can."""
    llm = {"use": "judges.llm:LLMScoreJudge", "model": "m", "base_url": "http://127.0.0.1:9/v1"}
    run = world(tmp_path / "run", beside, judge=llm, judge_budget={"cost": 5})
    with pytest.raises(JudgeError, match=r"cannot count its cost, so judge_budget\.cost would never hold"):
        run.go()
    priced = world(tmp_path / "priced", beside, judge=llm | {"price_in": 1.0}, judge_budget={"cost": 5})
    assert priced.run.judge(priced.run.experiment.judge, priced.run.experiment.comparing).judge.uncounted == ()


def test_a_judge_with_a_process_of_its_own_has_one_for_all_who_ask_it(tmp_path: Path, beside: Path) -> None:
    """The same judge with two schedules, and again inside a panel: started once. Another unit is another judge."""
    started: list[JudgeSpec] = []

    def place(spec: JudgeSpec, folders: Sequence[Path]) -> Judge:
        started.append(spec)
        return load_judge(spec, folders)

    run = world(tmp_path / "run", beside).run
    run.place_judge = place
    own = {"use": "judges.length:LengthJudge", "unit": "characters", "actor": {}}
    panel = {"use": "judges.panel:PanelJudge", "judges": [own, own | {"unit": "words"}]}
    for schedule in ("all_pairs", "swiss"):
        comparing = ComparingSpec.model_validate({"schedule": schedule})
        for spec in (own, panel):
            run.judge(JudgeSpec.model_validate(spec), comparing)
    assert [spec.params["unit"] for spec in started] == ["characters", "words"]
