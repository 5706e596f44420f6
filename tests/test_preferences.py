"""Preference pairs of every form are read alike; what is no pair is counted, and what is unclear is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.errors import DataError
from online_dpo.preferences import Preference, PreferenceSet, as_comparison, group_of, load_preferences, longer_wins
from online_dpo.types import Message

PAIRS = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "pairs"
USER, ASSISTANT = "user", "assistant"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps its tables in this test's folder, not in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> PreferenceSet:
    return load_preferences(write(tmp_path / "pairs.jsonl", rows), **options)


def only(found: PreferenceSet) -> tuple[list[tuple[str, str]], str, str]:
    """The only pair's messages, chosen and rejected answer."""
    [pair] = found.pairs
    return [(message.role, message.content) for message in pair.messages], pair.chosen, pair.rejected


def dialogue(*turns: str) -> str:
    """HH-RLHF's text of turns that begin with the human's."""
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    spoken = [{"role": ASSISTANT if i % 2 else USER, "content": turn} for i, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *spoken] if system else spoken


def real(name: str) -> str:
    if not (PAIRS / name).is_file():
        pytest.skip("the human comparisons (../shared/data/pairs) are not on this machine")
    return str(PAIRS / name)


# --- forms ---

HI = [(USER, "hi")]
TALK = [(USER, "hi"), (ASSISTANT, "hello"), (USER, "how?")]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"chosen": dialogue("hi", "good"), "rejected": dialogue("hi", "bad")}, HI),
        ({"chosen": dialogue("hi", "hello", "how?", "good"), "rejected": dialogue("hi", "hello", "how?", "bad")}, TALK),
        ({"chosen": chat("hi", "good"), "rejected": chat("hi", "bad")}, HI),
        ({"prompt": "hi", "chosen": "good", "rejected": "bad"}, HI),
        ({"question": "hi", "chosen": " good\n", "rejected": "bad "}, HI),
        ({"prompt": "hi", "chosen": chat("hi", "good"), "rejected": chat("hi", "bad")}, HI),
        ({"prompt": "hi", "chosen": chat("hi", "good")[1:], "rejected": chat("hi", "bad")[1:]}, HI),
        ({"prompt": chat("hi", "hello", "how?"), "chosen": "good", "rejected": "bad"}, TALK),
        (
            {"prompt": chat("hi", "hello", "how?"), "chosen": chat("", "good")[1:], "rejected": chat("", "bad")[1:]},
            TALK,
        ),
        ({"prompt": dialogue("hi", "hello", "how?", ""), "chosen": "good", "rejected": "bad"}, TALK),
        ({"prompt": dialogue("hi", "hello", "how?"), "chosen": "good", "rejected": "bad"}, TALK),
        ({"instruction": "hi", "input": "", "chosen": "good", "rejected": "bad", "output": "x"}, HI),
        ({"instruction": "fix", "input": "teh", "chosen": "good", "rejected": "bad"}, [(USER, "fix\n\nteh")]),
        (
            {"chosen": chat("hi", "good", system="be kind"), "rejected": chat("hi", "bad", system="be kind")},
            [("system", "be kind"), *HI],
        ),
    ],
)
def test_every_form_becomes_the_same_pair(tmp_path: Path, row: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    assert only(load(tmp_path, row)) == (messages, "good", "bad")


def test_choice_names_the_preferred_summary(tmp_path: Path) -> None:
    info = {"id": "t3_x", "post": "My cat left.", "title": "Cat", "subreddit": "pets"}
    summaries = [{"text": " first", "policy": "a"}, {"text": " second", "policy": "b"}]
    found = load(tmp_path, {"info": info, "summaries": summaries, "choice": 1})
    [(role, request)], chosen, rejected = only(found)
    assert (role, chosen, rejected) == (USER, "second", "first")
    assert request == "SUBREDDIT: pets\n\nTITLE: Cat\n\nPOST: My cat left.\n\nTL;DR:"


def test_plain_answer_that_speaks_of_humans_is_no_dialogue(tmp_path: Path) -> None:
    row = {"prompt": "hi", "chosen": "Well.\n\nHuman: is what I am", "rejected": "bad"}
    assert only(load(tmp_path, row)) == (HI, row["chosen"], "bad")


@given(st.lists(st.text(alphabet="abc :\n", min_size=1).map(str.strip).filter(bool), min_size=2, max_size=6))
def test_dialogue_gives_back_its_turns(turns: list[str]) -> None:
    """Any turns with something in them, none of which looks like the beginning of another."""
    from online_dpo.preferences import read_turns

    assert [message.content for message in read_turns(dialogue(*turns))] == turns


def test_every_file_format(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one, two", "chosen": 'say "three"', "rejected": "None"},
        {"prompt": "x", "chosen": "7", "rejected": "07"},
    ]
    table = datasets.Dataset.from_list(rows)
    lines = Path(write(tmp_path / "p.jsonl", rows))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    table.to_csv(tmp_path / "p.csv", index=False)
    table.to_parquet(tmp_path / "p.parquet")
    for name in ("p.jsonl", "p.json", "p.jsonl.gz", "p.csv", "p.parquet"):
        found = load_preferences(name, folders=[tmp_path])
        assert [(p.messages[0].content, p.chosen, p.rejected) for p in found.pairs] == [
            (row["prompt"], row["chosen"], row["rejected"]) for row in rows
        ], name
        assert found.source == name


# --- what is left out, and what is refused ---


def test_rows_that_hold_no_pair_are_counted(tmp_path: Path) -> None:
    good = {"chosen": dialogue("hi", "good"), "rejected": dialogue("hi", "bad")}
    found = load(
        tmp_path,
        {"chosen": dialogue("hi", "good"), "rejected": dialogue("ho", "bad")},
        {"chosen": dialogue("hi", " "), "rejected": dialogue("hi", "bad")},
        {"chosen": dialogue("hi"), "rejected": dialogue("hi")},  # ends with the question
        {"chosen": None, "rejected": None},
        {"chosen": dialogue("hi", "same"), "rejected": dialogue("hi", "same ")},
        {"chosen": "\n\nAssistant: I\n\nAssistant: am", "rejected": "\n\nAssistant: I\n\nAssistant: was"},
        good,
    )
    assert found.dropped == {"prompts_differ": 1, "empty": 3, "identical": 1, "no_question": 1, "undecided": 0}
    assert [pair.id for pair in found.pairs] == ["7"]


def test_summaries_without_a_choice_are_counted(tmp_path: Path) -> None:
    row = {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
    assert load(tmp_path, row, row | {"choice": None}).dropped["undecided"] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": 1}, r"pairs\.jsonl: no preference pairs in columns text, label; known forms: chosen"),
        ({"prompt": "a", "chosen": "b"}, "no preference pairs in columns prompt, chosen"),
        ({"chosen": "good", "rejected": "bad"}, "row 1: column 'chosen': no prompt before the answer, and no column"),
        ({"prompt": "a", "chosen": 3, "rejected": 4}, "row 1: column 'chosen': text or a list .* found int"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "row 1: column 'prompt': text or a list"),
        ({"chosen": [{"from": "x"}], "rejected": [{"from": "y"}]}, "row 1: column 'chosen': every message needs"),
        ({"info": {"post": "p"}, "summaries": [{"text": "a"}], "choice": 0}, "row 1: `info` and two `summaries`"),
        (
            {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2},
            "row 1: choice must be 0 or 1, found 2",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, r"no usable preference pair \(dropped: 1 identical\)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, row)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    load(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(DataError, match=r"no preference pairs at 'pears.jsonl' \(did you mean 'pairs.jsonl'\?\)"):
        load_preferences("pears.jsonl", folders=[tmp_path])


# --- ids, subsets, groups ---


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i % 3}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(count)]


def test_own_ids_are_kept_where_all_differ(tmp_path: Path) -> None:
    rows = [row | {"id": f"r{i}"} for i, row in enumerate(numbered(3))]
    assert [pair.id for pair in load(tmp_path, *rows).pairs] == ["r0", "r1", "r2"]
    twice = [row | {"id": "same"} for row in rows]
    assert [pair.id for pair in load(tmp_path, *twice).pairs] == ["1", "2", "3"]


def test_limit_draws_the_same_pairs_again_and_others_for_another_seed(tmp_path: Path) -> None:
    rows = numbered(40)
    drawn = [load(tmp_path, *rows, limit=10, seed=seed).pairs for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[2]) == 10
    everything = load(tmp_path, *rows).pairs
    assert [pair for pair in everything if pair in drawn[0]] == list(drawn[0])
    assert load(tmp_path, *rows, limit=99).pairs == everything
    with pytest.raises(DataError, match="limit must be at least 1, got 0"):
        load(tmp_path, *rows, limit=0)


def test_pairs_of_one_prompt_share_a_group_alone(tmp_path: Path) -> None:
    groups = [group_of(pair) for pair in load(tmp_path, *numbered(6)).pairs]
    assert groups[:3] == groups[3:]
    assert len(set(groups)) == 3


def test_comparison_has_the_chosen_answer_first() -> None:
    pair = Preference("p7", (Message(USER, "hi"),), "good", "bad")
    prompt, chosen, rejected = as_comparison(pair)
    assert (prompt.id, prompt.messages, prompt.token_ids) == ("p7", pair.messages, ())
    assert [(c.prompt_id, c.index, c.text, c.token_ids) for c in (chosen, rejected)] == [
        ("p7", 0, "good", ()),
        ("p7", 1, "bad", ()),
    ]


def test_longer_wins_counts_ties_half() -> None:
    """Longer, as long, shorter, longer but for white space (a tie): (1 + ½ + 0 + ½) / 4."""
    answers = (("long", "one"), ("one", "two"), ("a", "bb"), ("ab \n", "cd"))
    pairs = [Preference(str(i), (Message(USER, "x"),), won, lost) for i, (won, lost) in enumerate(answers)]
    assert longer_wins(pairs).mean == pytest.approx(0.5)
    assert longer_wins(pairs[:1]).mean == 1.0


# --- real data ---


@pytest.mark.parametrize(
    ("name", "pairs", "prompts", "dropped", "longer"),
    [
        ("helpful-base.test.jsonl.gz", 2339, 2339, {"prompts_differ": 9, "empty": 4, "identical": 2}, 0.5975),
        ("harmless-base.test.jsonl.gz", 2303, 2301, {"prompts_differ": 5, "empty": 4}, 0.4457),
        ("tldr-batch13.jsonl", 1097, 905, {}, 0.7088),
        ("politeness.json", 1094, 1069, {"identical": 6}, 0.5210),
    ],
)
def test_real_comparisons(name: str, pairs: int, prompts: int, dropped: dict[str, int], longer: float) -> None:
    found = load_preferences(real(name))
    assert len(found.pairs) == pairs
    assert len({group_of(pair) for pair in found.pairs}) == prompts
    assert {reason: count for reason, count in found.dropped.items() if count} == dropped
    assert longer_wins(found.pairs).mean == pytest.approx(longer, abs=5e-5)
    assert len({pair.id for pair in found.pairs}) == pairs
    assert all(pair.messages[-1].role == USER for pair in found.pairs)
