"""Judging while sampling: begun before the sampling ends, and nothing but the time of it is other than afterwards."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine
from test_loop import Killed, World, experiment, results

from online_dpo import sample_stage
from online_dpo.config import SamplingSpec
from online_dpo.errors import EngineError, JudgeError
from online_dpo.judging import Abstention, PointwiseJudge, VerdictCache, judge_all
from online_dpo.protocols import SampleRequest
from online_dpo.types import Candidate

MODULE = '''
import threading
from online_dpo.judging import Abstention, Opinion, PairwiseJudge, PointwiseJudge

class Paid(PointwiseJudge):
    """One unit a call; tells `judged` of every call. Abstains for good on `mute` prompts, for once on `shy` indices."""
    each_alone = True
    calls, judged, mute, shy, batches = 0, threading.Semaphore(0), (), (), []
    def __init__(self, concurrent=1, size=1):
        self.concurrent, self.batch_prompts, self.unpaid = concurrent, size, 0
    def score_batch(self, items):
        Paid.calls += 1
        self.unpaid += 1
        Paid.batches.append(tuple(prompt.id for prompt, _ in items))
        rows = [[self.one(prompt, c) for c in candidates] for prompt, candidates in items]
        Paid.judged.release()
        return rows
    def one(self, prompt, candidate):
        if prompt.id in Paid.mute or candidate.index in Paid.shy:
            return Abstention("no opinion", passing=candidate.index in Paid.shy)
        return Opinion(len(candidate.text))
    def ledger(self):
        paid, self.unpaid = self.unpaid, 0
        return {"calls": paid, "cost": float(paid)} if paid else {}

class Compares(PairwiseJudge):
    def prefer(self, prompt, first, second):
        Paid.judged.release()
        return 0.5 if len(first.text) == len(second.text) else float(len(first.text) > len(second.text))
'''
ON, OFF = {"judge_while_sampling": True}, {"judge_while_sampling": False}


class Waiting(FakeEngine):
    """Gives the second prompt's answers only when the judge was called for the first's: held-out ones at once."""

    judged: threading.Semaphore | None = None

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        for number, group in enumerate(super().sample(requests, sampling)):
            if number and sampling.n > 1 and self.judged is not None:
                assert self.judged.acquire(timeout=30), "nothing was judged while answers were sampled"
            yield group


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    (folder / "ahead_judges.py").write_text(MODULE, encoding="utf-8")
    return folder


@pytest.fixture
def paid(beside: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The judge's class, its counters at zero; the engine waits for it."""
    from online_dpo.judging import import_object

    kind: Any = import_object("ahead_judges:Paid", [beside])
    kind.calls, kind.judged, kind.mute, kind.shy, kind.batches = 0, threading.Semaphore(0), (), (), []
    monkeypatch.setattr(Waiting, "judged", kind.judged)
    return kind


def world(root: Path, beside: Path, cluster: dict[str, Any], **changes: Any) -> World:
    given = {"arms": {"a": {}}, "rounds": 1, "judge": "ahead_judges:Paid", "cluster": cluster, **changes}
    evaluation = {"judge": "judges.length:LengthJudge"}
    made = World(root, experiment(**given, evaluation=evaluation), judge_folders=(beside,), engine=Waiting)
    made.run.cache = VerdictCache(root / "verdicts.sqlite")
    return made


def ledger(made: World) -> dict[str, float]:
    found: dict[str, float] = made.metrics()["a", 1]["judge"]["ledger"]
    return found


@pytest.mark.parametrize("judge", ["Paid", "Compares"])
def test_answers_are_judged_while_others_are_sampled(
    tmp_path: Path, beside: Path, paid: Any, monkeypatch: pytest.MonkeyPatch, judge: str
) -> None:
    """The engine would wait for ever. Files, figures and ledger are those of judging afterwards."""
    use = {"judge": f"ahead_judges:{judge}"}
    ahead = world(tmp_path / "ahead" / "run", beside, ON, **use).go()
    assert ahead.run.judging_ahead == {}
    monkeypatch.setattr(Waiting, "judged", None)
    after = world(tmp_path / "after" / "run", beside, OFF, **use).go()
    assert results(ahead.root) == results(after.root)
    assert ledger(ahead) == ledger(after)
    assert ahead.run.cache is not None and after.run.cache is not None
    assert ahead.run.cache.spent() == after.run.cache.spent()
    if judge == "Paid":
        assert ledger(after) == {"asked": 9, "cached": 0, "calls": 3, "cost": 3.0}


@pytest.mark.parametrize(
    ("cluster", "judge", "expected"),
    [
        ({}, {}, False),
        ({}, {"concurrent": 4}, True),
        (OFF, {"concurrent": 4}, False),
        (ON, {"size": None}, False),
    ],
)
def test_by_default_only_judges_that_wait_for_a_server(
    tmp_path: Path, beside: Path, paid: Any, cluster: dict[str, Any], judge: dict[str, Any], expected: bool
) -> None:
    """`concurrent` above 1 is how a judge says so. One that wants the whole round at once gets it."""
    Waiting.judged = None
    made = world(tmp_path / "run", beside, cluster, judge={"use": "ahead_judges:Paid", **judge})
    begun: list[Any] = []
    judging = made.run.judging_ahead
    made.run.judging_ahead = type("Kept", (dict,), {"__setitem__": lambda self, key, value: begun.append(value)})()
    made.go()
    assert bool(begun) is expected
    assert judging == {}


def test_calls_of_several_prompts_have_the_same_company(tmp_path: Path, beside: Path, paid: Any) -> None:
    """Two prompts a call: the first call has the round's first two, though the engine gives the last one first."""
    Waiting.judged = None
    given = {"judge": {"use": "ahead_judges:Paid", "size": 2}}
    made = world(tmp_path / "run", beside, ON, **given).go()
    ids = made.folder("a", 1).pinned["prompts"]
    assert sorted(paid.batches) == sorted([(ids[0], ids[1]), (ids[2],)])


def test_killed_between_sampling_and_judging_nobody_is_asked_again(
    tmp_path: Path, beside: Path, paid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample stage is there, the judge stage is not; what was judged meanwhile is in the cache."""
    root = tmp_path / "run"
    first = world(root, beside, ON)

    def die(*_: Any, **__: Any) -> None:
        first.run.judging_ahead.popitem()[1].stop()
        raise Killed

    monkeypatch.setattr("online_dpo.sources.fresh.judge_round", die)
    with pytest.raises(Killed):
        first.go()
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    assert {path.stem for path in (first.folder("a", 1).path / "stages").iterdir()} == {"sample"}
    kept = paid.calls
    assert kept >= 2
    again = world(root, beside, ON).go()
    assert paid.calls == 3
    assert ledger(again)["cached"] == 3 * kept
    assert again.run.cache is not None and again.run.cache.spent() == {"calls": 3, "cost": 3}


def test_abstentions_count_once_and_are_not_asked_again(tmp_path: Path, beside: Path, paid: Any) -> None:
    """Each prompt's first, and passing: not in the cache, so the judge stage would ask for it a second time, and pay.
    The engine waits for all but the last prompt's."""
    paid.shy = (0,)
    made = world(tmp_path / "run", beside, ON, max_abstain=1.0).go()
    assert made.metrics()["a", 1]["judge"]["abstained"] == 3
    assert ledger(made) == {"asked": 9, "cached": 0, "calls": 3, "cost": 3.0}


def test_too_many_abstentions_end_the_round_as_they_do_afterwards(tmp_path: Path, beside: Path, paid: Any) -> None:
    """All of the first prompt's three of nine: more than 0.2. The judge is not called a second time."""
    Waiting.judged = None
    paid.mute = tuple(f"train-{i}" for i in range(7))
    made = world(tmp_path / "run", beside, ON)
    with pytest.raises(JudgeError, match=r"abstained on 3 of the 3 candidates judged so far \(of 9\)"):
        made.go()
    assert paid.calls == 1
    assert made.folder("a", 1).done("sample") is not None


def test_budget_holds_while_sampling(tmp_path: Path, beside: Path, paid: Any) -> None:
    Waiting.judged = None
    made = world(tmp_path / "run", beside, ON, judge_budget={"cost": 2})
    with pytest.raises(JudgeError, match="budget is used up: cost 2 of 2"):
        made.go()
    assert paid.calls == 2


def test_sampling_that_fails_ends_the_judging(
    tmp_path: Path, beside: Path, paid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world(tmp_path / "run", beside, ON)
    real = sample_stage.Generation.blocks

    def failing(asked: sample_stage.Generation) -> Any:
        if asked.taken is None:
            return real(asked)
        raise EngineError("gone")

    monkeypatch.setattr(sample_stage.Generation, "blocks", failing)
    with pytest.raises(EngineError, match="gone"):
        made.go()
    assert made.run.judging_ahead == {}


def test_known_answers_are_not_asked_for(tmp_path: Path) -> None:
    """By hand: two prompts, one known. The judge sees the other alone; too many known abstentions ask nobody."""
    from fakes import fake_prompt

    class Counts(PointwiseJudge):
        seen: list[str] = []  # noqa: RUF012 - the test's own

        def score(self, prompt: Any, candidates: Sequence[Candidate]) -> list[float]:
            self.seen.append(prompt.id)
            return [1.0] * len(candidates)

    prompts = {name: fake_prompt(name) for name in ("p", "q")}
    candidates = [Candidate(name, 0, "x", (1,), (-1.0,), "stop", 0) for name in prompts]
    known = {"p": [Abstention("mute")]}
    verdicts = judge_all(Counts(), prompts, candidates, max_abstain=0.5, known=known)
    assert Counts.seen == ["q"]
    assert [getattr(verdict, "reason", None) for verdict in verdicts] == ["mute", None]
    with pytest.raises(JudgeError, match=r"more than max_abstain 0\.4"):
        judge_all(Counts(), prompts, candidates, max_abstain=0.4, known=known)
    assert Counts.seen == ["q"]
