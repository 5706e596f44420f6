"""Loading judges by name, and turning their answers into verdicts and abstentions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from online_dpo.config import JudgeSpec
from online_dpo.errors import DataError, JudgeError
from online_dpo.judging import (
    Abstention,
    Item,
    PairwiseJudge,
    PointwiseJudge,
    Score,
    abstain_reasons,
    judge_all,
    judge_digest,
    judge_name,
    load_judge,
)
from online_dpo.types import Abstain, Candidate, Message, Prompt, Verdict


def prompt(name: str) -> Prompt:
    return Prompt(name, (Message("user", f"say {name}"),), (1, 2))


def answer(prompt_id: str, index: int, text: str = "x") -> Candidate:
    return Candidate(prompt_id, index, text, (3,) * (index + 1), (-0.5,) * (index + 1), "stop", index)


def spec(use: str, **params: Any) -> JudgeSpec:
    return JudgeSpec.model_validate({"use": use, **params})


PROMPTS = {name: prompt(name) for name in ("p", "q", "r")}


class Answers(PointwiseJudge):
    """Returns prepared answers by prompt id; an exception among them is raised."""

    def __init__(self, rows: dict[str, Any]) -> None:
        self.rows = rows

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
        row = self.rows[prompt.id]
        if isinstance(row, BaseException):
            raise row
        return row  # type: ignore[no-any-return]


class Table(PairwiseJudge):
    """prefer(first, second) from a table of index pairs."""

    def __init__(self, table: dict[tuple[int, int], Any]) -> None:
        self.table = table

    def prefer(self, prompt: Prompt, first: Candidate, second: Candidate) -> Score:
        value = self.table[first.index, second.index]
        if isinstance(value, BaseException):
            raise value
        return value  # type: ignore[no-any-return]


@pytest.fixture
def clean_imports() -> Iterator[None]:
    """Whatever a test imports or puts on sys.path is gone after it."""
    modules, path = dict(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]
    sys.modules.update(modules)


USER_MODULE = """
from online_dpo.judging import PointwiseJudge

class Vowels(PointwiseJudge):
    def __init__(self, weight, offset=0.0):
        self.weight = weight
        self.offset = offset
    def score(self, prompt, candidates):
        return [self.weight * sum(c.text.count(v) for v in "aeiou") + self.offset for c in candidates]

class Duck:
    def score(self, prompt, candidates):
        return [1.0 for _ in candidates]

class DuckPair:
    def prefer(self, prompt, first, second):
        return 0.75

class Both(Duck, DuckPair):
    pass

class Empty(PointwiseJudge):
    pass

class EmptyPair(__import__("online_dpo.judging").judging.PairwiseJudge):
    pass

class Neither:
    pass

class Angry(Duck):
    def __init__(self):
        raise RuntimeError("no\\nlicence")

def function(prompt, answer):
    return 1.0

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, clean_imports: None) -> Path:
    (tmp_path / "vowel_judges.py").write_text(USER_MODULE)
    (tmp_path / "experiment.yaml").write_text("name: x\n")
    return tmp_path


# --- judge_all, pointwise ------------------------------------------------------------------------------------


def test_results_stand_in_the_candidates_order() -> None:
    """Candidates of p and q interleaved: p scores (1, 2), q scores (3, 4), so p0 q0 q1 p1 gives 1 3 4 2."""
    order = [answer("p", 0), answer("q", 0), answer("q", 1), answer("p", 1)]
    results = judge_all(Answers({"p": [1, 2], "q": [3, 4]}), PROMPTS, order, max_abstain=0)
    assert results == [Verdict("p", 0, 1.0), Verdict("q", 0, 3.0), Verdict("q", 1, 4.0), Verdict("p", 1, 2.0)]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "judge declined"),
        (Abstention("off topic"), "off topic"),
        (float("nan"), "returned nan"),
        (float("-inf"), "returned -inf"),
        (np.float32("nan"), "returned nan"),
        ("5", "returned str, not a number"),
        ([5.0], "returned list, not a number"),
        (1 + 2j, "returned complex, not a number"),
        (10**400, "returned a number too large for a float"),
    ],
)
def test_what_is_no_finite_number_abstains_alone(value: object, reason: str) -> None:
    results = judge_all(Answers({"p": [value, 2.0]}), PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=0.5)
    assert results == [Abstain("p", 0, reason), Verdict("p", 1, 2.0)]


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), np.array(2.0)])
def test_numbers_of_any_library_are_scores(value: object) -> None:
    (result,) = judge_all(Answers({"p": [value]}), PROMPTS, [answer("p", 0)], max_abstain=0)
    assert result == Verdict("p", 0, 2.0)
    assert type(result.score) is float


@pytest.mark.parametrize("value", [True, np.bool_(True)])
def test_a_truth_value_is_one_or_zero(value: object) -> None:
    assert judge_all(Answers({"p": [value]}), PROMPTS, [answer("p", 0)], max_abstain=0) == [Verdict("p", 0, 1.0)]


def test_a_raising_judge_abstains_for_that_prompt_with_the_error() -> None:
    judge = Answers({"p": ValueError("bad\n answer"), "q": [1.0], "r": KeyError()})
    results = judge_all(judge, PROMPTS, [answer("p", 0), answer("q", 0), answer("r", 0)], max_abstain=1)
    assert results == [Abstain("p", 0, "ValueError: bad answer"), Verdict("q", 0, 1.0), Abstain("r", 0, "KeyError")]


def test_a_long_reason_is_cut() -> None:
    (result,) = judge_all(Answers({"p": ValueError("x" * 999)}), PROMPTS, [answer("p", 0)], max_abstain=1)
    assert isinstance(result, Abstain)
    assert len(result.reason) == 200


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_never_swallowed(stop: type[BaseException]) -> None:
    with pytest.raises(stop):
        judge_all(Answers({"p": stop()}), PROMPTS, [answer("p", 0)], max_abstain=1)
    with pytest.raises(stop):
        table = Table({(0, 1): stop()})
        judge_all(table, PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=1)


def test_a_judge_error_ends_the_run() -> None:
    with pytest.raises(JudgeError, match="wrong key"):
        judge_all(Answers({"p": JudgeError("wrong key")}), PROMPTS, [answer("p", 0)], max_abstain=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1.0], "returned 1 scores instead of 2"),
        ([1.0, 2.0, 3.0], "returned 3 scores instead of 2"),
        (None, "returned NoneType instead of 2 scores"),
        (0.5, "returned float instead of 2 scores"),
        ("ab", "returned str instead of 2 scores"),
        ({"a": 1, "b": 2}, "returned dict instead of 2 scores"),
    ],
)
def test_the_wrong_number_of_scores_breaks_the_contract(row: object, message: str) -> None:
    with pytest.raises(JudgeError, match=message) as caught:
        judge_all(Answers({"p": row}), PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=1)
    assert "test_judging:Answers" in str(caught.value)
    assert "prompt 'p'" in str(caught.value)


def test_too_many_abstentions_name_counts_reasons_and_first_prompt() -> None:
    """Four candidates, max_abstain 0.5 allows two. p (1) and q (1) abstain, then r's two: 4 of 4 > 2."""
    judge = Answers({"p": [None], "q": ValueError("x"), "r": [float("nan"), None]})
    candidates = [answer("p", 0), answer("q", 0), answer("r", 0), answer("r", 1)]
    with pytest.raises(JudgeError) as caught:
        judge_all(judge, PROMPTS, candidates, max_abstain=0.5)
    message = str(caught.value)
    assert "abstained on 4 of the 4 candidates" in message
    assert "judge declined (2); ValueError: x (1); returned nan (1)" in message
    assert "first at prompt 'p'" in message
    assert "\n" not in message


def test_exactly_max_abstain_is_allowed() -> None:
    results = judge_all(Answers({"p": [None, 1.0]}), PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=0.5)
    assert abstain_reasons(results) == {"judge declined": 1}


def test_a_hopeless_round_stops_early() -> None:
    """Ten candidates at max_abstain 0.1: the second abstention decides it, the other eight are not asked."""
    asked: list[int] = []

    class Broken(PointwiseJudge):
        def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
            asked.append(len(candidates))
            return [None]

    prompts = {str(i): prompt(str(i)) for i in range(10)}
    with pytest.raises(JudgeError, match="2 of the 2 candidates judged so far"):
        judge_all(Broken(), prompts, [answer(name, 0) for name in prompts], max_abstain=0.1)
    assert len(asked) == 2


def test_progress_adds_up_and_nothing_is_nothing() -> None:
    seen: list[int] = []
    candidates = [answer("p", 0), answer("p", 1), answer("q", 0)]
    judge = Answers({"p": [1, 2], "q": [3]})
    judge_all(judge, PROMPTS, candidates, max_abstain=0, on_progress=seen.append)
    assert seen == [2, 1]
    assert judge_all(judge, PROMPTS, [], max_abstain=0) == []


def test_an_unknown_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match="unknown prompt 'z'"):
        judge_all(Answers({}), PROMPTS, [answer("z", 0)], max_abstain=1)


class Batched(PointwiseJudge):
    """Scores each candidate by its index; a batch that holds `poison` raises."""

    batch_prompts = 2

    def __init__(self, poison: str = "") -> None:
        self.poison = poison
        self.calls: list[list[str]] = []

    def score_batch(self, items: Sequence[Item]) -> list[Sequence[Score]]:
        self.calls.append([prompt.id for prompt, _ in items])
        if self.poison in self.calls[-1]:
            raise RuntimeError("out of memory")
        return [[float(c.index) for c in candidates] for _, candidates in items]


def test_a_batched_judge_gets_batch_prompts_at_once() -> None:
    judge = Batched()
    candidates = [answer(name, i) for name in PROMPTS for i in range(2)]
    results = judge_all(judge, PROMPTS, candidates, max_abstain=0)
    assert judge.calls == [["p", "q"], ["r"]]
    assert results == [Verdict(c.prompt_id, c.index, float(c.index)) for c in candidates]
    assert judge.score(PROMPTS["p"], candidates[:2]) == [0.0, 1.0]


def test_one_bad_prompt_of_a_batch_abstains_alone() -> None:
    judge = Batched(poison="q")
    results = judge_all(judge, PROMPTS, [answer(name, 0) for name in PROMPTS], max_abstain=0.5)
    assert judge.calls == [["p", "q"], ["p"], ["q"], ["r"]]
    assert results == [Verdict("p", 0, 0.0), Abstain("q", 0, "RuntimeError: out of memory"), Verdict("r", 0, 0.0)]


def test_the_wrong_number_of_rows_breaks_the_contract() -> None:
    class Short(Batched):
        def score_batch(self, items: Sequence[Item]) -> list[Sequence[Score]]:
            return super().score_batch(items)[:1]

    with pytest.raises(JudgeError, match="returned 1 lists of scores instead of 2"):
        judge_all(Short(), PROMPTS, [answer("p", 0), answer("q", 0)], max_abstain=1)


@pytest.mark.parametrize("size", [0, -1, 2.0, "2"])
def test_a_wrong_batch_size_is_named(size: Any) -> None:
    judge = Batched()
    judge.batch_prompts = size
    with pytest.raises(JudgeError, match="batch_prompts"):
        judge_all(judge, PROMPTS, [answer("p", 0)], max_abstain=1)


# --- judge_all, pairwise -------------------------------------------------------------------------------------


def test_borda_scores_average_both_orders() -> None:
    """A judge that likes the first place: the averaged wins are 0 over 1: (.9+1-.3)/2 = .8; 0 over 2:
    (.8+1-.4)/2 = .7; 1 over 2: (.7+1-.5)/2 = .6. Means over the two others: 0: (.8+.7)/2 = .75;
    1: (.2+.6)/2 = .4; 2: (.3+.4)/2 = .35. They sum to n/2 = 1.5.
    """
    table = Table({(0, 1): 0.9, (1, 0): 0.3, (0, 2): 0.8, (2, 0): 0.4, (1, 2): 0.7, (2, 1): 0.5})
    results = judge_all(table, PROMPTS, [answer("p", i) for i in range(3)], max_abstain=0)
    assert [v.score for v in results if isinstance(v, Verdict)] == pytest.approx([0.75, 0.4, 0.35])


def test_a_judge_that_only_sees_the_place_finds_all_equal() -> None:
    """prefer = 1 always: (1 + 1 - 1)/2 = 0.5 for every pair."""
    table = Table({(i, j): 1.0 for i in range(3) for j in range(3)})
    results = judge_all(table, PROMPTS, [answer("p", i) for i in range(3)], max_abstain=0)
    assert [v.score for v in results if isinstance(v, Verdict)] == [0.5, 0.5, 0.5]


def test_a_comparison_needs_both_orders() -> None:
    """(0,2) has one order only and (1,2) fails: candidate 2 has no comparison and abstains with the first fault;
    0 and 1 keep 0 over 1 = (.9+1-.3)/2 = .8, and .2.
    """
    table = Table({(0, 1): 0.9, (1, 0): 0.3, (0, 2): 0.8, (2, 0): None, (1, 2): ValueError("no"), (2, 1): 0.5})
    results = judge_all(table, PROMPTS, [answer("p", i) for i in range(3)], max_abstain=0.5)
    assert results[2] == Abstain("p", 2, "judge declined")
    assert [v.score for v in results[:2] if isinstance(v, Verdict)] == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1.5, "returned a number outside [0, 1]"),
        (-0.1, "returned a number outside [0, 1]"),
        (float("nan"), "returned nan"),
        (ValueError("x"), "ValueError: x"),
    ],
)
def test_what_is_no_probability_abstains(value: object, reason: str) -> None:
    table = Table({(0, 1): value, (1, 0): 0.5})
    results = judge_all(table, PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=1)
    assert results == [Abstain("p", 0, reason), Abstain("p", 1, reason)]


def test_a_lone_candidate_cannot_be_compared() -> None:
    results = judge_all(Table({}), PROMPTS, [answer("p", 0)], max_abstain=1)
    assert results == [Abstain("p", 0, "no other candidate to compare with")]


# --- load_judge ----------------------------------------------------------------------------------------------


def test_a_user_module_beside_the_yaml_is_found(folder: Path) -> None:
    judge = load_judge(spec("vowel_judges:Vowels", weight=2), [folder])
    results = judge_all(judge, PROMPTS, [answer("p", 0, "aeb")], max_abstain=0)
    assert results == [Verdict("p", 0, 4.0)]
    load_judge(spec("vowel_judges:Vowels", weight=2), [folder])
    assert sys.path.count(str(folder.resolve())) == 1
    assert sys.path[-1] == str(folder.resolve()), "a user's folder never comes before installed packages"


@pytest.mark.parametrize(("name", "expected"), [("Duck", 1.0), ("DuckPair", 0.5)])
def test_duck_typed_judges_are_accepted(folder: Path, name: str, expected: float) -> None:
    """DuckPair always says .75 for the first: (.75 + 1 - .75)/2 = .5."""
    judge = load_judge(spec(f"vowel_judges:{name}"), [folder])
    assert judge_name(judge) == f"vowel_judges:{name}"
    results = judge_all(judge, PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=0)
    assert [v.score for v in results if isinstance(v, Verdict)] == [expected, expected]


@pytest.mark.parametrize(
    ("use", "params", "message"),
    [
        ("vowel_judge:Vowels", {}, "no module 'vowel_judge' (did you mean 'vowel_judges'?)"),
        ("no.such.module:Judge", {}, "no module 'no.such.module'"),
        ("vowel_judges.deeper:Judge", {}, "no module 'vowel_judges.deeper'"),
        ("judges.lenght:LengthJudge", {}, "no module 'judges.lenght' (did you mean 'judges.length'?)"),
        ("vowel_judges:Vowel", {}, "module 'vowel_judges' has no 'Vowel' (did you mean 'Vowels'?)"),
        ("vowel_judges:Zzz", {}, "has no 'Zzz'; it has: Vowels, Duck"),
        ("vowel_judges:Vowels", {"weigth": 1}, "unknown key 'weigth' (did you mean 'weight'?)"),
        ("vowel_judges:Vowels", {"zzz": 1}, "unknown key 'zzz'; known: weight, offset"),
        ("vowel_judges:Duck", {"zzz": 1}, "unknown key 'zzz'; it takes no keys"),
        ("vowel_judges:Vowels", {"offset": 1}, "key 'weight' is missing"),
        ("vowel_judges:Neither", {}, "is not a judge"),
        ("vowel_judges:Both", {}, "has both 'score' and 'prefer'"),
        ("vowel_judges:Empty", {}, "does not define 'score'"),
        ("vowel_judges:EmptyPair", {}, "does not define 'prefer'"),
        ("vowel_judges:Angry", {}, "cannot be constructed: RuntimeError: no licence"),
        ("vowel_judges:function", {}, "is a function, not a class; write use: judges.function:FunctionJudge"),
        ("vowel_judges:number", {}, "is a int, not a class"),
    ],
)
def test_what_cannot_be_loaded_is_named_in_one_line(
    folder: Path, use: str, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(JudgeError) as caught:
        load_judge(spec(use, **params), [folder])
    assert message in str(caught.value)
    assert use.partition(":")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_package_nobody_has\n", "needs 'a_package_nobody_has', which is not installed"),
        ("def broken(:\n", "cannot be imported: SyntaxError"),
        ("raise RuntimeError('side effect')\n", "cannot be imported: RuntimeError: side effect"),
    ],
)
def test_a_module_that_does_not_import_is_told_from_a_missing_one(folder: Path, source: str, message: str) -> None:
    (folder / "bad_judge_module.py").write_text(source)
    with pytest.raises(JudgeError, match=message):
        load_judge(spec("bad_judge_module:Judge"), [folder])


def test_a_hidden_module_beside_the_yaml_is_an_error(folder: Path) -> None:
    """`string` is Python's own and is imported already: the user's file of that name must not be passed over."""
    (folder / "string.py").write_text(USER_MODULE)
    with pytest.raises(JudgeError, match=r"string\.py is hidden by .*string\.py: rename it"):
        load_judge(spec("string:Vowels", weight=1), [folder])


@pytest.mark.parametrize("source", ["class LengthJudge: pass\n", "import a_package_nobody_has\n", "1 / 0\n"])
def test_another_projects_judges_package_is_told_from_ours(
    tmp_path: Path, clean_imports: None, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges" / "__init__.py").write_text(source)
    (tmp_path / "judges" / "length.py").write_text(source)
    for name in [name for name in sys.modules if name.partition(".")[0] == "judges"]:
        monkeypatch.delitem(sys.modules, name)
    sys.path.insert(0, str(tmp_path))
    for load in (load_judge, judge_digest):
        for use in ("judges.length:LengthJudge", "judges:LengthJudge"):
            with pytest.raises(JudgeError, match=r"not online-dpo's; another project on PyPI has the same name"):
                load(spec(use), [])


# --- judge_digest --------------------------------------------------------------------------------------------


def test_the_digest_follows_use_params_and_source_only(folder: Path) -> None:
    base = judge_digest(spec("vowel_judges:Vowels", weight=2, offset=1.0), [folder])
    assert judge_digest(spec("vowel_judges:Vowels", offset=1.0, weight=2), [folder]) == base, "order of keys"
    assert judge_digest(spec("vowel_judges:Vowels", weight=3, offset=1.0), [folder]) != base
    assert judge_digest(spec("vowel_judges:Duck", weight=2, offset=1.0), [folder]) != base
    (folder / "vowel_judges.py").write_text(USER_MODULE + "# changed\n")
    assert judge_digest(spec("vowel_judges:Vowels", weight=2, offset=1.0), [folder]) != base


def test_the_digest_does_not_construct(folder: Path) -> None:
    assert len(judge_digest(spec("vowel_judges:Angry"), [folder])) == 64


def test_the_digest_follows_the_code_that_a_function_judge_names(folder: Path) -> None:
    judge = spec("judges.function:FunctionJudge", function="vowel_judges:function")
    base = judge_digest(judge, [folder])
    (folder / "vowel_judges.py").write_text(USER_MODULE + "# changed\n")
    assert judge_digest(judge, [folder]) != base


@pytest.mark.parametrize("load", [load_judge, judge_digest])
def test_the_digest_needs_a_real_judge_too(folder: Path, load: Callable[..., object]) -> None:
    with pytest.raises(JudgeError, match="no module 'nowhere'"):
        load(spec("nowhere:Judge"), [folder])


def test_reasons_are_counted_most_frequent_first() -> None:
    verdicts: list[Verdict | Abstain] = [
        Abstain("p", 0, "a"),
        Verdict("p", 1, 0.0),
        Abstain("p", 2, "b"),
        Abstain("p", 3, "b"),
    ]
    assert list(abstain_reasons(verdicts).items()) == [("b", 2), ("a", 1)]
