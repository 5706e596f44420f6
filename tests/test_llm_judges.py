"""The judges that ask a language model, against a server on loopback that says what a test tells it to."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_double import HOSTILE, PROMPT, Double, Step, candidate, material, said

from judges.llm import LLMJudge, LLMRankingJudge, LLMScoreJudge
from judges.llm_base import LLMBase
from judges.llm_slots import Slots
from online_dpo.config import JudgeSpec
from online_dpo.errors import JudgeError
from online_dpo.judging import (
    Abstention,
    AskedJudge,
    Asking,
    Opinion,
    VerdictCache,
    judge_digest,
    load_judge,
    open_judge,
)

ROOT = Path(__file__).resolve().parents[1]
RED, BLUE = candidate("red"), candidate("blue", 1)
NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("judges.llm_client.FIRST_WAIT_S", 0.01)


def keys(url: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "base_url": url, "timeout_s": 5.0, "patience_s": 2.0, **more}


def opinion(found: object) -> Opinion:
    assert isinstance(found, Opinion), found
    return found


def shown(request: Mapping[str, Any], label: str) -> str:
    """What stands in the slot of that label, found by the code lines."""
    found = re.search(rf"----- begin {label} (\w+) -----\n(.*)\n----- end {label} \1 -----", material(request), re.S)
    assert found is not None
    return found[2]


# --- pairwise ---


def test_a_comparison_shows_both_in_their_places_and_reads_the_probability() -> None:
    with Double(lambda request, number: said("A", [{"A": 0.6, "B": 0.2, "The": 0.2}])) as server:
        judge = LLMJudge(**keys(server.url, criteria="The warmer colour wins."))
        found = opinion(judge.prefer(PROMPT, RED, BLUE))
    assert found.value == pytest.approx(0.75)
    assert found.details == {
        "by": "logprobs", "mass": pytest.approx(0.8), "prompt_tokens": 10, "completion_tokens": 2, "tokens": 12,
    }  # fmt: skip
    [request] = server.requests
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert (shown(request, "request"), shown(request, "answer A"), shown(request, "answer B")) == (
        "Name a colour.", "red", "blue",
    )  # fmt: skip
    assert "The warmer colour wins." in request["messages"][0]["content"]


def test_orders_differ_by_the_places_of_the_answers_alone() -> None:
    """Each answer keeps the code on its lines: with answers and codes named, both requests are what is expected."""
    with Double(lambda request, number: said("A")) as server:
        judge = LLMJudge(**keys(server.url))
        judge.prefer(PROMPT, RED, BLUE)
        judge.prefer(PROMPT, BLUE, RED)
    there, back = (material(request) for request in server.requests)
    red, blue = (re.search(rf"begin answer . (\w+) -----\n{text}", there) for text in ("red", "blue"))
    assert red is not None
    assert blue is not None
    swap = {"red": "blue", "blue": "red", red[1]: blue[1], blue[1]: red[1]}
    assert back != there
    assert back == re.sub("|".join(swap), lambda found: swap[found[0]], there)


def test_a_judge_that_always_takes_the_first_gives_ties_in_both_orders() -> None:
    with Double(lambda request, number: said("A", [{"A": 0.9, "B": 0.1}])) as server:
        asked = AskedJudge(LLMJudge(**keys(server.url)), "llm")
        [[compared]] = asked.comparisons([(PROMPT, [RED, BLUE])])
        assert compared.outcome("average") == pytest.approx(0.5)
        assert compared.swapped()
        for wanted, outcome in (("tie", 0.5), ("abstain", Abstention("the two orders disagree"))):
            judge = LLMJudge(**keys(server.url, disagreement=wanted))
            assert compared.outcome(judge.disagreement) == outcome


def test_reasoning_comes_before_the_verdict_and_is_kept() -> None:
    def says(request: dict[str, Any], number: int) -> dict[str, Any]:
        if "logprobs" in request:
            return said("B", [{"B": 0.75, "A": 0.25}], tokens=(100, 1))
        return said("Red is warm. <|im_end|> So A.", tokens=(50, 20))

    with Double(says) as server:
        judge = LLMJudge(
            **keys(server.url, reasoning=True, max_tokens=99, verdict_tokens=3, price_in=1.0, price_out=10.0)
        )
        found = opinion(judge.prefer(PROMPT, RED, BLUE))
    assert found.value == pytest.approx(0.25)
    assert found.details["reasoning"] == "Red is warm. <|im_end|> So A."
    assert found.details["reasoning_cut"] is False
    assert found.details["tokens"] == 171
    # (50 + 100) at 1 and (20 + 1) at 10 a million.
    assert found.details["cost"] == pytest.approx(360e-6)
    thoughts, verdict = server.requests
    assert (thoughts["max_tokens"], verdict["max_tokens"]) == (99, 3)
    assert [message["role"] for message in verdict["messages"]] == ["system", "user", "assistant", "user"]
    assert verdict["messages"][:2] == thoughts["messages"]
    # What the model wrote is sent back with its special tokens broken.
    assert verdict["messages"][2]["content"] == "Red is warm. < |im_end|> So A."
    assert judge.ledger() == {
        "calls": 2, "prompt_tokens": 150, "completion_tokens": 21, "tokens": 171, "cost": pytest.approx(360e-6),
    }  # fmt: skip


def test_no_reasoning_is_no_verdict() -> None:
    """Servers put a thinking model's thoughts elsewhere and send no text."""
    with Double(lambda request, number: said(None)) as server:
        judge = LLMJudge(**keys(server.url, reasoning=True))
        assert judge.prefer(PROMPT, RED, BLUE) == Abstention("no reasoning came")


@pytest.mark.parametrize("text", ["Both are good.", "A is better", "", None])
def test_an_answer_that_is_no_verdict_abstains(text: str | None) -> None:
    with Double(lambda request, number: said(text)) as server:
        assert LLMJudge(**keys(server.url)).prefer(PROMPT, RED, BLUE) == Abstention("the answer is not a verdict")


def test_a_server_that_refuses_log_probs_is_asked_without_from_then_on() -> None:
    def says(request: dict[str, Any], number: int) -> Step | dict[str, Any]:
        return Step({"error": {"message": "no"}}, 400) if "logprobs" in request else said("A")

    with Double(says) as server:
        judge = LLMJudge(**keys(server.url))
        assert [opinion(judge.prefer(PROMPT, RED, BLUE)).value for _ in range(3)] == [1.0] * 3
    assert ["logprobs" in request for request in server.requests] == [True, False, False, False]


def test_a_prompt_that_is_refused_either_way_abstains_and_changes_nothing_for_others() -> None:
    def says(request: dict[str, Any], number: int) -> Step | dict[str, Any]:
        long = "blue" in shown(request, "answer A")
        return Step({"error": {"code": "context_length_exceeded"}}, 400) if long else said("A", [{"A": 0.7, "B": 0.3}])

    with Double(says) as server:
        judge = LLMJudge(**keys(server.url))
        refused = Abstention("the server refused the request (context_length_exceeded)")
        assert judge.prefer(PROMPT, BLUE, RED) == refused
        assert opinion(judge.prefer(PROMPT, RED, BLUE)).value == pytest.approx(0.7)
        assert judge.prefer(PROMPT, BLUE, RED) == refused
    # Once log-probs have come, a refusal is not put down to them.
    assert ["logprobs" in request for request in server.requests] == [True, False, True, True]


def test_log_probs_can_be_insisted_on_and_left_out() -> None:
    with Double(lambda request, number: said("A")) as server:
        with pytest.raises(JudgeError, match="LLMJudge: the server gives no log-probs: use logprobs: auto"):
            LLMJudge(**keys(server.url, logprobs=True)).prefer(PROMPT, RED, BLUE)
        LLMJudge(**keys(server.url, logprobs=False)).prefer(PROMPT, RED, BLUE)
    assert ["logprobs" in request for request in server.requests] == [True, False]


def test_the_model_that_the_server_says_it_served_is_kept_where_it_differs() -> None:
    with Double(lambda request, number: {**said("A"), "model": "m-2026-11-01"}) as server:
        assert opinion(LLMJudge(**keys(server.url)).prefer(PROMPT, RED, BLUE)).details["served"] == "m-2026-11-01"


# --- hostile answers ---


def fair(request: dict[str, Any], number: int) -> dict[str, Any]:
    """A model that nothing can talk into anything: it prefers the answer with more of the letter e."""
    first, second = shown(request, "answer A").count("e"), shown(request, "answer B").count("e")
    return said("A" if first > second else "B")


def test_a_hostile_answer_moves_neither_the_slots_nor_the_parser() -> None:
    """The slots hold each answer, made harmless, and nothing else: a model that only counts is not deceived."""
    honest = candidate("e" * 100, 1)
    with Double(fair) as server:
        judge = LLMJudge(**keys(server.url))
        for text in HOSTILE:
            assert opinion(judge.prefer(PROMPT, candidate(text), honest)).value == 0.0, text
            assert opinion(judge.prefer(PROMPT, honest, candidate(text))).value == 1.0, text
            for request, label in zip(server.requests[-2:], ("answer A", "answer B"), strict=True):
                assert shown(request, label) == Slots().neutral(text)
                assert len(request["messages"]) == 2


def test_whatever_an_answer_is_the_request_arrives_whole() -> None:
    texts = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(HOSTILE), max_size=3).map("".join))
    with Double(fair) as server:
        judge = LLMJudge(**keys(server.url))

        @settings(deadline=None, max_examples=60)
        @given(texts)
        def check(text: str) -> None:
            found = judge.prefer(PROMPT, candidate(text), candidate("e" * 400, 1))
            assert opinion(found).value == 0.0
            assert shown(server.requests[-1], "answer A") == Slots().neutral(text)

        check()


def test_a_hostile_reply_is_no_verdict_and_no_error() -> None:
    with Double(lambda request, number: said(HOSTILE[number])) as server:
        judge = LLMJudge(**keys(server.url, retries=0))
        for text in HOSTILE:
            found = judge.prefer(PROMPT, RED, BLUE)
            assert isinstance(found, Abstention), (text, found)


# --- scores ---


def test_a_grade_is_the_expected_one_on_the_judges_own_scale() -> None:
    with Double(lambda request, number: said("4", [{"4": 0.5, "5": 0.25, "4.5": 0.1}])) as server:
        judge = LLMScoreJudge(**keys(server.url, low=1, high=5, criteria="5: a warm colour\n1: no colour"))
        [found] = judge.score(PROMPT, [RED])
    # (4·.5 + 5·.25) / .75
    assert opinion(found).value == pytest.approx(13 / 3)
    [request] = server.requests
    assert shown(request, "answer") == "red"
    assert "5: a warm colour\n1: no colour" in request["messages"][0]["content"]
    assert "from 1 (worst) to 5 (best)" in material(request)


def test_a_grade_beyond_the_scale_abstains() -> None:
    with Double(lambda request, number: said("11")) as server:
        assert LLMScoreJudge(**keys(server.url)).score(PROMPT, [RED]) == [Abstention("the answer is not a verdict")]


def test_grades_are_asked_one_by_one_and_remembered_one_by_one(tmp_path: Path) -> None:
    with Double(lambda request, number: said("7")) as server, VerdictCache(tmp_path / "c.sqlite") as cache:
        judge = AskedJudge(LLMScoreJudge(**keys(server.url)), "llm", digest="d", asking=Asking(cache))
        judge.scores([(PROMPT, [RED])])
        [answers] = judge.scores([(PROMPT, [BLUE, RED])])
        assert [opinion(answer).value for answer in answers] == [7.0, 7.0]
        assert len(server.requests) == 2


# --- rankings ---


def by_length(request: dict[str, Any], number: int) -> dict[str, Any]:
    """Ranks longer answers higher."""
    slots = re.findall(
        r"----- begin answer (\w) (\w+) -----\n(.*?)\n----- end answer \1 \2 -----", material(request), re.S
    )
    return said(" > ".join(label for label, _, text in sorted(slots, key=lambda slot: -len(slot[2]))))


def test_a_ranking_scores_the_share_of_the_others_that_are_below() -> None:
    answers = [candidate("x" * length, i) for i, length in enumerate((3, 9, 1, 6))]
    with Double(by_length) as server:
        found = LLMRankingJudge(**keys(server.url, orders=3)).score(PROMPT, answers)
    assert [opinion(row).value for row in found] == pytest.approx([1 / 3, 1.0, 0.0, 2 / 3])
    assert all(opinion(row).details["spread"] == pytest.approx(0.0) for row in found)
    # Three requests of 12 tokens, a quarter of them each.
    assert [opinion(row).details["tokens"] for row in found] == [9.0] * 4
    assert len(server.requests) == 3


def test_a_model_that_ranks_by_place_gives_everybody_the_same() -> None:
    """An order and the same backwards: whoever was first was last."""
    answers = [candidate("x" * length, i) for i, length in enumerate((3, 9, 1, 6))]
    with Double(lambda request, number: said("A > B > C > D")) as server:
        found = LLMRankingJudge(**keys(server.url)).score(PROMPT, answers)
    assert [opinion(row).value for row in found] == pytest.approx([0.5] * 4)
    assert max(float(opinion(row).details["spread"] or 0) for row in found) == pytest.approx(0.5)


def test_orders_are_shuffled_and_the_same_again() -> None:
    answers = [candidate("x" * length, i) for i, length in enumerate(range(1, 9))]
    judge = LLMRankingJudge(**keys(NOWHERE, orders=4))
    orders = judge._orders(answers)
    assert orders == judge._orders(answers)
    assert orders[1] == orders[0][::-1]
    assert len({tuple(order) for order in [*orders, list(range(8))]}) == 5
    assert all(sorted(order) == list(range(8)) for order in orders)


def test_one_reply_that_is_no_ranking_makes_all_abstain() -> None:
    with Double(lambda request, number: said("A > B") if number == 0 else said("both")) as server:
        found = LLMRankingJudge(**keys(server.url)).score(PROMPT, [RED, BLUE])
    assert found == [Abstention("the answer is not a ranking")] * 2


def test_too_few_and_too_many_to_rank() -> None:
    judge = LLMRankingJudge(**keys(NOWHERE))
    assert judge.score(PROMPT, [RED]) == [Abstention("no other candidate to compare with")]
    with pytest.raises(JudgeError, match="prompt 'p' has 27 candidates; at most 26"):
        judge.score(PROMPT, [RED] * 27)


# --- under the framework ---


def test_requests_run_at_once_and_none_is_asked_twice_after_a_server_was_away(tmp_path: Path) -> None:
    """After 20 answers the server fails for good. The second run asks for what is missing and for nothing else."""
    answers = [candidate(f"colour {i}", i) for i in range(8)]
    told: Counter[str] = Counter()

    def says(request: dict[str, Any], number: int) -> Step | dict[str, Any]:
        if broken and sum(told.values()) >= 20:
            return Step("", 503)
        told[material(request)] += 1
        return Step(said("A", [{"A": 0.6, "B": 0.4}]), delay=0.01)

    broken = True
    with Double(says) as server, VerdictCache(tmp_path / "c.sqlite") as cache:
        for again in (False, True):
            spec = JudgeSpec.model_validate(
                {"use": "judges.llm:LLMJudge", **keys(server.url, concurrency=6, patience_s=0.3)}
            )
            asked = open_judge(spec, [], Asking(cache))
            if not again:
                with pytest.raises(JudgeError, match="status 503"):
                    asked.comparisons([(PROMPT, answers)])
                broken = False
            else:
                [rows] = asked.comparisons([(PROMPT, answers)])
                assert len(rows) == 28
        assert set(told.values()) == {1}
        assert len(told) == len(cache) == 56
        assert cache.spent()["calls"] == 56
        assert cache.spent()["tokens"] == 56 * 12
        assert server.most_at_once > 2


def test_a_budget_of_calls_stops_it_early(tmp_path: Path) -> None:
    answers = [candidate(f"colour {i}", i) for i in range(8)]
    with Double(lambda request, number: said("A")) as server, VerdictCache(tmp_path / "c.sqlite") as cache:
        spec = JudgeSpec.model_validate({"use": "judges.llm:LLMJudge", **keys(server.url, concurrency=1)})
        with pytest.raises(JudgeError, match="budget is used up: calls 5 of 5"):
            open_judge(spec, [], Asking(cache, budget={"calls": 5})).comparisons([(PROMPT, answers)])
        assert len(server.requests) == 5


def test_slow_answers_are_asked_for_again_in_the_next_run(tmp_path: Path) -> None:
    with Double(lambda request, number: Step(said("A"), delay=0.4 if number == 0 else 0.0)) as server:
        spec = JudgeSpec.model_validate({"use": "judges.llm:LLMJudge", **keys(server.url, timeout_s=0.15, retries=0)})
        with VerdictCache(tmp_path / "c.sqlite") as cache:
            asked = open_judge(spec, [], Asking(cache))
            slow = asked.prefer([(PROMPT, RED, BLUE)])
            assert slow == [Abstention("no answer within the time limit", passing=True)]
            assert opinion(asked.prefer([(PROMPT, RED, BLUE)])[0]).value == 1.0


# --- constructor ---


def digest(**params: Any) -> str:
    return judge_digest(JudgeSpec.model_validate({"use": "judges.llm:LLMJudge", "model": "m", **params}), [])


def test_what_changes_no_verdict_is_no_part_of_the_digest() -> None:
    plain = digest()
    neutral = {"base_url": NOWHERE, "concurrency": 2, "patience_s": 9, "retries": 9, "timeout_s": 9, "price_in": 1}
    assert all(digest(**{key: value}) == plain for key, value in neutral.items())
    deciding = {"version": "2", "criteria": "x", "reasoning": True, "min_mass": 0.1, "seed": 1, "logprobs": False}
    assert len({plain, *(digest(**{key: value}) for key, value in deciding.items())}) == len(deciding) + 1


def test_the_templates_text_is_part_of_the_digest(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    text = LLMJudge.data_files[0].read_text(encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    before = digest(template=str(file))
    file.write_text(text + "\nBe kind.", encoding="utf-8")
    assert digest(template=str(file)) != before


def test_a_template_beside_the_experiment_is_used(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(
        "=== user ===\n{prompt}{answer_a}{answer_b}\n=== verdict ===\nWhich?", encoding="utf-8"
    )
    spec = JudgeSpec.model_validate({"use": "judges.llm:LLMJudge", "template": "mine.txt", **keys(NOWHERE)})
    judge = load_judge(spec, [tmp_path])
    assert isinstance(judge, LLMBase)
    assert judge.filled_in.sections["verdict"] == "Which?"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"model": ""}, "LLMJudge: model must be text, found ''"),
        ({"concurrency": 0}, "LLMJudge: concurrency must be a whole number from 1, found 0"),
        ({"retries": True}, "LLMJudge: retries must be a whole number from 0, found True"),
        ({"timeout_s": 0}, "LLMJudge: timeout_s must be a number above 0, found 0"),
        ({"patience_s": float("inf")}, "LLMJudge: patience_s must be a number above 0, found inf"),
        ({"temperature": float("nan")}, "LLMJudge: temperature must be a number from 0, found nan"),
        ({"price_in": "3"}, "LLMJudge: price_in must be a number from 0, found '3'"),
        ({"min_mass": 1.5}, "LLMJudge: min_mass is a probability, found 1.5"),
        ({"seed": 1.5}, "LLMJudge: seed must be a whole number, found 1.5"),
        ({"logprobs": "maybe"}, "LLMJudge: logprobs must be auto, yes or no, found 'maybe'"),
        ({"logprobs": ["yes"]}, "LLMJudge: logprobs must be auto, yes or no, found ['yes']"),
        ({"reasoning": "yes"}, "LLMJudge: reasoning must be true or false, found 'yes'"),
        ({"criteria": 3}, "LLMJudge: criteria must be text, found 3"),
        (
            {"token_limit": "max_token"},
            "token_limit must be max_tokens or max_completion_tokens (did you mean 'max_tok",
        ),
        ({"special_tokens": "<x>"}, "LLMJudge: special_tokens must be a list of strings"),
        ({"special_tokens": ["x"]}, "LLMJudge: special_tokens must be a list of strings"),
        ({"extra_body": "x"}, "LLMJudge: extra_body must hold keys and values, found 'x'"),
        ({"disagreement": "tied"}, "disagreement must be one of average, tie, abstain (did you mean 'tie'?)"),
        ({"base_url": "localhost"}, "LLMJudge: base_url must look like http://host:port/v1, found 'localhost'"),
        ({"template": "nowhere.txt"}, "template 'nowhere.txt': cannot be read"),
        ({"modell": "m"}, "judge 'judges.llm:LLMJudge': unknown key 'modell' (did you mean 'model'?)"),
    ],
)
def test_a_wrong_key_is_one_clear_line(params: dict[str, Any], message: str) -> None:
    spec = JudgeSpec.model_validate({"use": "judges.llm:LLMJudge", **keys(NOWHERE), **params})
    with pytest.raises(JudgeError) as raised:
        load_judge(spec, [])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ends", [(5, 5), (-1, 3), (1, 2.5), (True, 3), (0, 5000)])
def test_an_impossible_scale_is_one_clear_line(ends: tuple[Any, Any]) -> None:
    with pytest.raises(JudgeError, match="LLMScoreJudge: low and high must be whole numbers from 0 to 1000"):
        LLMScoreJudge(**keys(NOWHERE, low=ends[0], high=ends[1]))


def test_importing_and_constructing_load_nothing_heavy() -> None:
    code = (
        "import sys; from judges.llm import LLMJudge; LLMJudge(model='m', base_url='http://127.0.0.1:9/v1');"
        "print([m for m in ('openai', 'torch', 'transformers', 'vllm', 'httpx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
