"""Templates and slots: what a stranger's text can and cannot do in a request."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_double import HOSTILE

from judges.llm_prompts import Template, conversation, own_template
from judges.llm_slots import Slots, code_of
from online_dpo.errors import JudgeError
from online_dpo.types import Message, Prompt

SLOTS = ("prompt", "answer_a", "answer_b")
MINIMAL = "=== user ===\n{prompt}{answer_a}{answer_b}\n=== verdict ===\nA or B?"


def template(tmp_path: Path, text: str, **keys: object) -> Template:
    file = tmp_path / "mine.txt"
    file.write_text(text, encoding="utf-8")
    options: dict[str, object] = {"slots": SLOTS, "plain": ("criteria",), **keys}
    return Template(file, **options)  # type: ignore[arg-type] # keys of the one call


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{prompt}", "section '=== user ===' is missing or empty"),
        ("=== user ===\n{prompt}{answer_a}{answer_b}", "section '=== verdict ===' is missing or empty"),
        ("=== user ===\n{prompt}{answer_a}\n=== verdict ===\nx", "field '{answer_b}' is missing"),
        (MINIMAL + "{answer_aa}", "unknown field '{answer_aa}' (did you mean 'answer_a'?)"),
        (MINIMAL + "{xyzzy}", "unknown field '{xyzzy}'; known: answer_a, answer_b, criteria, prompt"),
        (MINIMAL + "{prompt}", "field '{prompt}' belongs into section 'user', not 'verdict'"),
        (MINIMAL + "\n=== verdict ===\nx", "section 'verdict' stands there twice"),
        (MINIMAL + "\n=== usr ===\nx", "unknown section 'usr' (did you mean 'user'?)"),
        (MINIMAL + ' {"a": 1}', "section 'verdict' has a single '{': write it twice for a brace"),
        (MINIMAL + " }", "section 'verdict' has a single '}': write it twice for a brace"),
    ],
)
def test_a_wrong_template_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(JudgeError) as raised:
        template(tmp_path, text)
    assert str(raised.value) == f"template '{tmp_path / 'mine.txt'}': {message}"


def test_a_template_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"nowhere\.txt': cannot be read"):
        Template(tmp_path / "nowhere.txt", slots=SLOTS, plain=())
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JudgeError, match=r"binary\.txt': cannot be read"):
        Template(tmp_path / "binary.txt", slots=SLOTS, plain=())


def test_reasoning_needs_its_section(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="section '=== reasoning ===' is missing or empty"):
        template(tmp_path, MINIMAL, reasoning=True)


def test_criteria_of_ones_own_need_a_place(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"field '\{criteria\}' is missing"):
        template(tmp_path, MINIMAL, needed=("criteria",))


def test_what_stands_above_the_sections_is_a_note_and_braces_can_be_written(tmp_path: Path) -> None:
    text = "Mine, with {any} brace.\n" + MINIMAL + ' {{"best": "{criteria}"}}'
    filled = template(tmp_path, text).fill(dict.fromkeys(SLOTS, "x"), {"criteria": "wit"})
    assert filled.first(reasoning=False) == [{"role": "user", "content": 'xxx\n\nA or B? {"best": "wit"}'}]


@pytest.mark.parametrize(
    ("name", "slots", "plain"),
    [
        ("pairwise", SLOTS, ("criteria",)),
        ("score", ("prompt", "answer"), ("criteria", "low", "high")),
        ("ranking", ("prompt", "answers"), ("criteria", "labels")),
    ],
)
def test_the_judges_own_templates_are_sound(name: str, slots: tuple[str, ...], plain: tuple[str, ...]) -> None:
    made = Template(own_template(name), slots=slots, plain=plain, needed=plain, reasoning=True)
    filled = made.fill(dict.fromkeys(slots, "X"), dict.fromkeys(plain, "Y"))
    roles = [message["role"] for message in filled.second("because")]
    assert roles == ["system", "user", "assistant", "user"]


def test_a_conversation_says_who_spoke() -> None:
    prompt = Prompt("p", (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Why?")), (1,))
    assert conversation(prompt) == "(user)\nHi\n\n(assistant)\nYes?\n\n(user)\nWhy?"


# --- slots ---


@pytest.mark.parametrize(
    ("text", "neutral"),
    [
        ("<|im_end|>", "< |im_end|>"),
        ("<|im_end|><|im_start|>", "< |im_end|>< |im_start|>"),
        ("<<|im_end|>|im_end|>", "<< |im_end|>|im_end|>"),
        ("<turn|>", "< turn|>"),
        ("<｜User｜>", "< ｜User｜>"),
        ("[/INST]", "[ /INST]"),
        ("<<SYS>>", "< <SYS>>"),
        ("</s>", "< /s>"),
        ("<S>", "< S>"),
        ("a\r\nb\tc", "a\nb\tc"),
        ("\x00", "\\u0000"),
        ("\ud83d", "\\ud83d"),
        ("\u202e", "\\u202e"),
        ("\U000e0041", "\\ue0041"),
    ],
)
def test_special_tokens_and_hidden_characters_are_broken_visibly(text: str, neutral: str) -> None:
    assert Slots().neutral(text) == neutral


@pytest.mark.parametrize(
    "text",
    ["x < y and y > z", "a |> b", "<b>bold</b>", "if (a<b || c>d)", "xs[0]", "عربي", "👩‍👩‍👧", "naïve", "1 <2> 3"],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert Slots().neutral(text) == text


def test_more_special_tokens_can_be_named() -> None:
    assert Slots(("~~END~~", "@@")).neutral("x~~END~~y @@@") == "x~ ~END~~y @ @ @"


def test_nothing_that_is_broken_comes_together_again() -> None:
    slots = Slots()
    for text in HOSTILE:
        assert slots.special.search(slots.neutral(text)) is None


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(max_size=60), st.sampled_from(HOSTILE)), min_size=3, max_size=3))
def test_a_text_stays_between_its_two_lines(texts: list[str]) -> None:
    """Whatever the texts are: each line occurs once, in order, and no text holds a line's code."""
    fenced = Slots().fence({field: (field, text) for field, text in zip(SLOTS, texts, strict=True)})
    codes = {field: fenced[field].split("\n", 1)[0].split()[3] for field in SLOTS}
    lines = [f"----- {end} {field} {codes[field]} -----" for field in SLOTS for end in ("begin", "end")]
    whole = "\n".join(fenced[field] for field in SLOTS)
    found = [line for line in whole.split("\n") if any(code in line for code in codes.values())]
    assert found == lines
    assert all(len(code) == 16 for code in codes.values())
    whole.encode("utf-8")  # it can be sent


@settings(deadline=None)
@given(st.lists(st.text(max_size=60), min_size=3, max_size=3))
def test_filling_is_done_in_one_pass(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    made = template(tmp_path_factory.mktemp("t"), MINIMAL)
    marked = [f"{{answer_b}}{{{{{text}}}}}" for text in texts]
    filled = made.fill(dict(zip(SLOTS, marked, strict=True)), {"criteria": "c"})
    assert filled.user == "".join(marked)


def test_a_code_goes_with_its_text_wherever_it_stands() -> None:
    assert code_of("one", ["one", "two"]) == code_of("one", ["three", "one"])
    assert code_of("one", ["one", "two"]) != code_of("two", ["one", "two"])


def test_a_text_that_holds_the_code_of_another_changes_it() -> None:
    """Who knows the prompt can work out its code, and the next: neither is used then."""
    first = code_of("prompt", ["prompt"])
    second = code_of("prompt", ["prompt", f"----- end request {first.upper()} -----"])
    third = code_of("prompt", ["prompt", f"{first} {second}"])
    assert len({first, second, third}) == 3


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_shown_as_it_is_but_for_what_is_broken(text: str) -> None:
    fenced = Slots().fence({"answer_a": ("answer A", text)})["answer_a"]
    inside = re.fullmatch(r"----- begin answer A (\w{16}) -----\n(.*)\n----- end answer A \1 -----", fenced, re.S)
    assert inside is not None
    assert inside[2] == Slots().neutral(text)
