"""Judges in Ray actors: real Ray, real processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from online_dpo.backends import ray_cluster as cluster
from online_dpo.backends.ray_judges import JudgePlacer, place_judge
from online_dpo.backends.ray_session import RaySession
from online_dpo.cluster_spec import ClusterSpec
from online_dpo.config import JudgeSpec
from online_dpo.errors import ConfigError, JudgeError
from online_dpo.judging import Asking, PairwiseJudge, VerdictCache, judge_all, open_judge
from online_dpo.types import Abstain, Candidate, Message, Prompt, Verdict

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = {name: Prompt(name, (Message("user", name),), (1,)) for name in ("p", "q")}
CANDIDATES = [Candidate(p, i, "x" * (i + 1), (1,), (-1.0,), "stop", 0) for p in PROMPTS for i in range(2)]

MODULE = """
import os
from online_dpo.judging import Abstention, Opinion, PairwiseJudge, PointwiseJudge

class Far(PointwiseJudge):
    batch_prompts = 2
    each_alone = True
    def __init__(self, fail=""):
        self.fail, self.calls = fail, 0
    def score_batch(self, items):
        self.calls += 1
        if self.fail == "die":
            os._exit(3)
        if any(prompt.id == self.fail for prompt, _ in items):
            raise ValueError("no opinion")
        told = {"process": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"],
                "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
        return [[Opinion(len(c.text), told) for c in candidates] for _, candidates in items]
    def ledger(self):
        calls, self.calls = self.calls, 0
        return {"calls": calls}

class FarPair(PairwiseJudge):
    both_orders = False
    def prefer(self, prompt, first, second):
        return 0.75
"""


@pytest.fixture(scope="module")
def live_ray() -> Iterator[None]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    cluster.start_ray()
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the judges' module: one for the file, since a module is imported once."""
    folder = tmp_path_factory.mktemp("far")
    (folder / "far_judges.py").write_text(MODULE, encoding="utf-8")
    return folder


@pytest.fixture
def far(live_ray: None, beside: Path, tmp_path: Path) -> Callable[..., Any]:
    """`far(use, **params)`: the judge opened in an actor, with a cache."""

    def make(use: str = "Far", **params: Any) -> Any:
        spec = JudgeSpec.model_validate({"use": f"far_judges:{use}", "actor": {"threads": 1}, **params})
        asking = Asking(cache=VerdictCache(tmp_path / "cache.sqlite"))
        return open_judge(spec, [beside], asking, place_judge)

    return make


def test_it_judges_in_another_process_with_its_own_threads(far: Callable[..., Any]) -> None:
    asked = far()
    verdicts = judge_all(asked, PROMPTS, CANDIDATES, max_abstain=0)
    assert [verdict.score for verdict in verdicts if isinstance(verdict, Verdict)] == [1, 2, 1, 2]
    details = verdicts[0].details if isinstance(verdicts[0], Verdict) else {}
    assert details["process"] != os.getpid()
    assert details["threads"] == "1"
    assert details["gpus"] == "", "a judge that asked for no GPU sees none"
    assert asked.take_ledger() == {"asked": 4, "cached": 0, "calls": 1}
    assert asked.batch == 2
    assert asked.judge.each_alone is True


def test_who_asks_for_the_same_judge_gets_the_same_process_and_a_ledger_of_its_own(
    live_ray: None, beside: Path, tmp_path: Path
) -> None:
    """Two lanes of a run: a reward model is loaded once, and each stage counts its own calls."""
    placer = JudgePlacer(RaySession(ClusterSpec()))
    spec = JudgeSpec.model_validate({"use": "far_judges:Far", "actor": {"threads": 1}})
    first, second = (open_judge(spec, [beside], Asking(), placer) for _ in range(2))
    answers = [judge_all(asked, PROMPTS, CANDIDATES, max_abstain=0) for asked in (first, second, second)]
    processes = {verdict.details["process"] for row in answers for verdict in row if isinstance(verdict, Verdict)}
    assert len(processes) == 1
    assert first.take_ledger() == {"asked": 4, "cached": 0, "calls": 1}
    assert second.take_ledger() == {"asked": 8, "cached": 0, "calls": 2}


def test_what_it_said_is_cached_here(far: Callable[..., Any]) -> None:
    judge_all(far(), PROMPTS, CANDIDATES, max_abstain=0)
    again = far()
    judge_all(again, PROMPTS, CANDIDATES, max_abstain=0)
    assert again.take_ledger() == {"asked": 0, "cached": 4}


def test_an_exception_there_abstains_for_its_prompt_alone(far: Callable[..., Any]) -> None:
    verdicts = judge_all(far(fail="q"), PROMPTS, CANDIDATES, max_abstain=0.5)
    assert [type(verdict) for verdict in verdicts] == [Verdict, Verdict, Abstain, Abstain]
    assert isinstance(verdicts[2], Abstain)
    assert verdicts[2].reason == "ValueError: no opinion"


def test_a_process_that_dies_ends_the_run_in_one_line(far: Callable[..., Any]) -> None:
    with pytest.raises(JudgeError, match=r"far_judges:Far.*its process ended") as caught:
        judge_all(far(fail="die"), PROMPTS, CANDIDATES, max_abstain=1)
    assert "\n" not in str(caught.value)


def test_a_pairwise_judge_keeps_its_kind(far: Callable[..., Any]) -> None:
    asked = far("FarPair")
    assert isinstance(asked.judge, PairwiseJudge)
    assert asked.judge.both_orders is False
    judge_all(asked, PROMPTS, CANDIDATES, max_abstain=0)
    assert asked.take_ledger()["asked"] == 2  # one pair a prompt, one order


def test_a_wrong_key_is_its_own_error(far: Callable[..., Any]) -> None:
    with pytest.raises(JudgeError, match=r"unknown key 'fial'.*did you mean 'fail'"):
        far(fial="q")


def test_gpus_that_are_not_there(live_ray: None, tmp_path: Path) -> None:
    spec = JudgeSpec.model_validate({"use": "judges.length:LengthJudge", "actor": {"gpus": 2}})
    with pytest.raises(ConfigError, match=r"actor\.gpus asks for 2 GPUs, there are 0"):
        open_judge(spec, [tmp_path], Asking(), place_judge)
