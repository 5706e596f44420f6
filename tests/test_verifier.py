"""Right or wrong: what counts as an answer's result, how each kind verifies it, and where references come from."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges import expressions
from judges.answers import Answers
from judges.final_answer import LONGEST, Number, boxes, final_number, final_text, numbers
from judges.verifier import VerifierJudge
from online_dpo.config import JudgeSpec, PairingSpec
from online_dpo.errors import DataError, JudgeError, OnlineDPOError
from online_dpo.judging import Abstention, PointwiseJudge, judge_all, judge_digest, load_judge
from online_dpo.pairing import make_pairs
from online_dpo.types import Abstain, Candidate, Message, Prompt, Verdict

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "prompts" / "gsm8k_test.jsonl"
USE = "judges.verifier:VerifierJudge"


def prompt(text: str, prompt_id: str = "p") -> Prompt:
    return Prompt(prompt_id, (Message("system", "Be brief."), Message("user", text)), (1,))


def candidates(*texts: str, prompt_id: str = "p") -> list[Candidate]:
    return [
        Candidate(prompt_id, i, text, tuple(text.encode()), (-1.0,) * len(text.encode()), "stop", i)
        for i, text in enumerate(texts)
    ]


def verdicts(reference: str | float, *texts: str, tmp_path: Path, **params: Any) -> list[Any]:
    """The scores of `texts` where the question "q" has this reference answer."""
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": reference}) + "\n", encoding="utf-8")
    return VerifierJudge(answers=str(file), **params).score(prompt("q"), candidates(*texts))


# --- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She pays $1,234.50.", ["1234.5"]),
        ("-$5, $-5, (-5), −5 and +5", ["-5", "-5", "-5", "-5", "5"]),
        ("5-3 = 2 of COVID-19", ["5", "3", "2", "19"]),
        ("1/2, 1 1/2 cups, 7/0", ["1/2", "3/2"]),
        (r"\frac{3}{4} of 18{,}000 or \$20", ["3/4", "18000", "20"]),
        ("1\u202f000 and 1,2345", ["1000", "1", "2345"]),
        ("so...18, .5, 3.14", ["18", "1/2", "157/50"]),
        ("1e-3, 2.5E2, 1e999999999", ["1/1000", "250"]),
        ("x2 is no number, 5kg is", ["5"]),
        ("9" * 5000, []),
        ("three", []),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, expected: list[str]) -> None:
    assert [number.value for number in numbers(text)] == [Fraction(value) for value in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 3 = 5", "5"),
        ("#### 18", "18"),
        ("9 - 5 = 4\n#### **$1,018**\n\nIs 7 right?", "1018"),
        ("#### Step 1\nWe have 6.\n#### 2. Sum\nIt is 7", "7"),
        (r"First \boxed{3}, no: \boxed{\text{x} = \frac{1}{2}}. See page 9.", "1/2"),
        ("The answer is 5 apples, 3 more than 2.", "5"),
        ("**Answer:** 12\nThanks for all 99.", "12"),
        ("The answer is clear. It is 4.", "4"),
        ("The answer is:\n\n8 of 9 is 10", "10"),
    ],
)
def test_the_result_is_where_the_answer_says(text: str, expected: str) -> None:
    found = final_number(text)
    assert found is not None
    assert found.value == Fraction(expected)


def test_boxes_count_their_braces() -> None:
    assert boxes(r"\boxed{a{b}c} \boxed {d} \boxed{e{f}") == ["a{b}c", "d"]


WHOLE = st.integers(-(10**15), 10**15)


@given(whole=WHOLE, decimals=st.integers(0, 999), currency=st.sampled_from(["", "$", "€"]), grouped=st.booleans())
def test_a_written_number_is_read_back(whole: int, decimals: int, currency: str, grouped: bool) -> None:
    """sign, currency, whole part with or without separators, three decimals: exactly the value that was written."""
    written = f"{abs(whole):,}" if grouped else str(abs(whole))
    text = f"In all it is {'-' if whole < 0 else ''}{currency}{written}.{decimals:03d}."
    size = abs(whole) + Fraction(decimals, 1000)
    assert [number.value for number in numbers(text)] == [-size if whole < 0 else size]


@given(over=st.integers(0, 10**9), under=st.integers(1, 10**9), whole=st.integers(0, 10**6))
def test_fractions_are_exact(over: int, under: int, whole: int) -> None:
    assert final_number(f"{over}/{under}") == Number(Fraction(over, under))
    assert final_number(f"{whole} {over}/{under}") == Number(whole + Fraction(over, under))
    assert final_number(rf"\boxed{{\frac{{{over}}}{{{under}}}}}") == Number(Fraction(over, under))


@given(st.text(alphabet="0123456789.,-/$%e{}#\\ boxedfracansweris:\n\u202f", max_size=80) | st.text(max_size=80))
def test_no_text_breaks_the_reader(text: str) -> None:
    if not any(digit in text for digit in "0123456789"):
        assert final_number(text) is None
    elif (found := final_number(text)) is not None:
        assert found.value.denominator <= 10**LONGEST
    assert final_text(text) in text


@pytest.mark.parametrize("part", ["answer is ", "####", r"\boxed{", "9", "- "])
def test_long_hostile_answers_take_linear_time(part: str) -> None:
    """In quadratic time these would run into the time limit of tests."""
    text = part * (200_000 // len(part))
    assert final_number(text) is None
    assert len(final_text(text)) <= len(text)


def test_a_percent_sign_is_a_unit_or_a_factor() -> None:
    half, fifty, percent = Number(Fraction(1, 2)), Number(Fraction(50)), Number(Fraction(50), percent=True)
    assert percent.equals(half)
    assert fifty.equals(percent)
    assert not half.equals(fifty)
    assert not Number(Fraction(1, 2), percent=True).equals(percent)


# --- kinds ---------------------------------------------------------------------------------------------------


def test_exact_answers_are_compared_without_case_space_and_period(tmp_path: Path) -> None:
    texts = ("Paris", " paris. ", "The answer is **Paris**.", r"\boxed{PARIS}", "Paris, France", "")
    assert verdicts("Paris", *texts, kind="exact", tmp_path=tmp_path) == [1, 1, 1, 1, 0, 0]
    assert verdicts("Paris", *texts, kind="exact", match_case=True, tmp_path=tmp_path) == [1, 0, 1, 0, 0, 0]
    assert verdicts("Paris", "Paris", "Paris.", kind="exact", match_period=True, tmp_path=tmp_path) == [1, 0]
    assert verdicts("e\u0301t\u00e9", "\u00e9te\u0301", kind="exact", tmp_path=tmp_path) == [1]


def test_numeric_answers_are_exact_unless_a_tolerance_is_given(tmp_path: Path) -> None:
    texts = ("It is 0.30", "0.1+0.2 makes 3/10", "30%", "0.31", "no idea")
    assert verdicts(0.3, *texts, kind="numeric", tmp_path=tmp_path) == [1, 1, 1, 0, 0]
    assert verdicts("0.3", *texts, kind="numeric", tolerance=0.01, tmp_path=tmp_path) == [1, 1, 1, 1, 0]


def test_a_pattern_is_found_or_is_the_whole_answer(tmp_path: Path) -> None:
    texts = candidates("No. Yes", "yes", "maybe")
    assert VerifierJudge("regex", pattern="(?i)yes").score(prompt("q"), texts) == [1, 1, 0]
    assert VerifierJudge("regex", pattern="(?i)yes", whole=True).score(prompt("q"), texts) == [0, 1, 0]
    assert verdicts(r"\bcats?\b", "a cat", "catalogue", kind="regex", tmp_path=tmp_path) == [1, 0]


def test_an_expression_that_would_not_end_abstains(monkeypatch: pytest.MonkeyPatch) -> None:
    """(a|aa)+$ tries every way to cut a row of a's into ones and twos, about 1.6 to the power of their number."""
    monkeypatch.setattr(expressions, "LIMIT_S", 0.05)
    said = VerifierJudge("regex", pattern="(a|aa)+$").score(prompt("q"), candidates("a" * 80 + "b", "aa"))
    assert said == [Abstention("the expression took too long on this answer", passing=True), 1.0]


SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "number"}}}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"n": 1}', True),
        ('Here:\n```json\n{"n": 1.5}\n```\nDone.', True),
        ('```\n{"n": "1"}\n```', False),
        ('{"n": NaN}', False),
        ('{"m": 1}', False),
        ('{"n": 1', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_json_is_held_against_the_schema(text: str, right: bool, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    for judge in (VerifierJudge("json_schema", schema=SCHEMA), VerifierJudge("json_schema", schema_file=str(file))):
        assert judge.score(prompt("q"), candidates(text)) == [float(right)]


def test_a_schema_that_refers_elsewhere_ends_the_run_and_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **_: asked.append(args))
    judge = VerifierJudge("json_schema", schema={"$ref": "http://localhost/other.json"})
    with pytest.raises(JudgeError, match="refers to what it does not hold"):
        judge.score(prompt("q"), candidates("{}"))
    assert asked == []


def test_a_function_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deciding_for_a_test.py").write_text(
        "import numpy\n"
        "def two(prompt_text, answer):\n"
        "    return {'yes': True, 'no': numpy.bool_(False), 'none': None, 'odd': 0.5}[answer]\n"
        "def three(prompt_text, answer, reference):\n"
        "    return answer == reference + prompt_text\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    two = VerifierJudge("function", function="deciding_for_a_test:two")
    assert two.score(prompt("q"), candidates("yes", "no", "none", "odd", "?")) == [
        1.0,
        0.0,
        Abstention("the function returned neither true nor false"),
        Abstention("the function returned neither true nor false"),
        Abstention("KeyError: '?'"),
    ]
    function = "deciding_for_a_test:three"
    assert verdicts("A", "Aq", "A", kind="function", function=function, tmp_path=tmp_path) == [1.0, 0.0]


# --- references ----------------------------------------------------------------------------------------------


def test_references_are_found_by_the_prompts_text_or_its_id(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufeffquestion,answer\n"How  many,\neggs?",1\n', encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps([{"key": 7, "solution": "2"}, {"key": "x", "solution": 3}]))
    by_text = Answers(str(tmp_path / "a.csv"))
    assert by_text.find(prompt("How many, eggs?")) == "1"
    assert by_text.find(prompt("How many?")) is None
    by_id = Answers(str(tmp_path / "b.json"), answer_column="solution", id_column="key")
    assert by_id.find(prompt("any", "7")) == "2"
    assert by_id.find(prompt("any", "x")) == "3"
    assert by_id.find(prompt("7", "y")) is None


def test_a_prompt_without_a_reference_abstains(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"prompt": "known", "answer": "1"}\n')
    spec = JudgeSpec.model_validate({"use": USE, "kind": "numeric", "answers": "answers.jsonl"})
    judge = load_judge(spec, [tmp_path])
    prompts = {"p": prompt("known"), "r": prompt("unknown", "r")}
    asked = [*candidates("1"), *candidates("1", prompt_id="r")]
    assert judge_all(judge, prompts, asked, max_abstain=0.5) == [
        Verdict("p", 0, 1.0),
        Abstain("r", 0, "no reference answer"),
    ]


def test_the_answers_are_part_of_the_judges_digest(tmp_path: Path) -> None:
    spec = JudgeSpec.model_validate({"use": USE, "kind": "numeric", "answers": "answers.jsonl"})
    digests = set()
    for answer in ("1", "2"):
        (tmp_path / "answers.jsonl").write_text(json.dumps({"prompt": "p", "answer": answer}))
        digests.add(judge_digest(spec, [tmp_path]))
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x", "anser": 1}', r"row 1: no column 'answer' \(did you mean 'anser'"),
        ("a.jsonl", '{"promt": "x", "answer": 1}', r"no column 'prompt' \(did you mean 'promt'"),
        ("a.jsonl", '{"prompt": "x", "answer": null}', "row 1: column 'answer': a text or a number is needed"),
        ("a.jsonl", '{"prompt": "x", "answer": "none"}', "row 1: no number in the answer 'none'"),
        ("a.jsonl", '{"prompt": "x", "answer": 1}\n{"prompt": "x ", "answer": 2}', "row 2: another answer than row 1"),
        ("a.jsonl", "{", "cannot be read"),
        ("a.jsonl", "", "no rows"),
        ("a.json", '{"x": 1}', "a list of rows is needed"),
        ("a.txt", "x", "not from '.txt'"),
        ("b.jsonl", None, "cannot be read"),
    ],
)
def test_a_bad_answers_file_is_named(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        VerifierJudge("numeric", str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kind": "numerical"}, "did you mean 'numeric'"),
        ({"kind": "exact"}, "kind exact needs answers"),
        ({"kind": "exact", "answers": "x", "tolerance": 1}, "takes no 'tolerance'"),
        ({"kind": "regex"}, "needs pattern or answers"),
        ({"kind": "regex", "pattern": "a", "answers": "b"}, "not both"),
        ({"kind": "regex", "pattern": "("}, "not a regular expression"),
        ({"kind": "regex", "pattern": "a", "whole": 1}, "whole must be true or false"),
        ({"kind": "regex", "pattern": "a", "id_column": "id"}, "id_column needs answers"),
        ({"kind": "json_schema", "schema": {"type": "objekt"}}, "not a JSON Schema"),
        ({"kind": "json_schema", "schema_file": "nowhere.json"}, "cannot be read"),
        ({"kind": "numeric", "answers": "x", "tolerance": -1}, "tolerance must be a number from 0"),
        ({"kind": "numeric", "answers": 3}, "answers must be a text"),
        ({"kind": "exact", "answers": "x", "id_column": "i", "prompt_column": "p"}, "not both"),
        ({"kind": "function", "function": "math:pi"}, "is a float, not a function"),
    ],
)
def test_wrong_keys_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(OnlineDPOError, match=message):
        load_judge(JudgeSpec.model_validate({"use": USE, **params}), [])


# --- together ------------------------------------------------------------------------------------------------


def test_right_against_wrong_makes_the_pair_and_agreement_is_a_tie(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": name, "answer": 6}) for name in "mrw"))
    judge = VerifierJudge("numeric", str(tmp_path / "a.jsonl"))
    prompts = {name: prompt(name, name) for name in "mrw"}
    texts = {"m": ("5", "It is 6.", "7"), "r": ("6", "6.0"), "w": ("1", "2")}
    asked = [one for name, row in texts.items() for one in candidates(*row, prompt_id=name)]
    said = judge_all(judge, prompts, asked, max_abstain=0)
    result = make_pairs(prompts, asked, said, PairingSpec(rule="best_vs_worst"), seed=0)
    assert [(pair.prompt.id, pair.chosen.index, pair.rejected.index) for pair in result.pairs] == [("m", 1, 0)]
    assert result.dropped == {"tie": 2}


@pytest.fixture(scope="module")
def gsm8k() -> list[dict[str, str]]:
    if not GSM8K.is_file():
        pytest.skip("the GSM8K test questions (../shared/data/prompts) are not on this machine")
    return [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]


def test_each_gsm8k_solution_is_right_and_one_more_is_wrong(gsm8k: list[dict[str, str]]) -> None:
    """All 1319: the solution itself, its bare result, three ways to state it; and each of these with result + 1."""
    judge: PointwiseJudge = VerifierJudge("numeric", str(GSM8K))
    assert len(gsm8k) == 1319
    for row in gsm8k:
        before, _, result = row["answer"].rpartition("#### ")
        wrong = f"{int(result.replace(',', '')) + 1:,}"
        forms = (before + "#### {}", "{}", "{}.00", r"So 12 of them make \boxed{{{}}} in 3 days.",
                 "The answer is {}. I took 2 steps.", "It costs ${} in all.")  # fmt: skip
        texts = [
            form.replace("{}", value) if form is forms[0] else form.format(value)
            for value in (result, wrong)
            for form in forms
        ]
        said = judge.score(prompt(row["question"]), candidates(*texts))
        assert said == [1.0] * len(forms) + [0.0] * len(forms), (row["question"], texts)
