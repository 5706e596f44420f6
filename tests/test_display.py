"""Progress lines, figures and tables; hostile text stays text."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from online_dpo.display import (
    WIDTH,
    PlainProgress,
    QuietProgress,
    RichProgress,
    ShownAnswer,
    ShownPrompt,
    budget_table,
    clean,
    interval,
    make_progress,
    number,
    round_table,
    sample_answers,
    share,
    stage_table,
)


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def around(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def metrics_row(arm: str = "on_policy", seed: int = 0, index: int = 1) -> dict[str, Any]:
    """A round's metrics.json with every figure."""
    row: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "round": index,
        "held_out": {
            "n": 64,
            "abstained": 1,
            "reward": around(-0.4125, 0.0831),
            "reward_change": None,
            "win_rate": None,
            "kl_initial": None,
            "kl_initial_token": None,
            "kl_reference": None,
            "length": 58.44,
            "ended": 0.3125,
            "distinct_2": 0.8123,
        },
        "seconds": {"evaluate": 21.24},
        "reused": [],
    }
    if index == 0:
        return row
    row["held_out"] |= {
        "reward_change": around(0.1234, 0.05),
        "win_rate": around(0.61, 0.09),
        "kl_initial": around(123.4, 20.0),
        "kl_initial_token": 0.0123,
        "kl_reference": around(23.4, 10.0),
    }
    return row | {
        "sample": {"candidates": 96, "tokens": 5800, "seconds": 34.0, "tokens_per_second": 171.2},
        "judge": {"verdicts": 94, "abstained": 2, "reasons": {"declined": 2}},
        "pairs": {"kept": 22, "dropped": {"tie": 3, "same_text": 0, "below_margin": 4}, "margin": 0.81},
        "train": {
            "trained": "pairs",
            "answers": 44,
            "steps": 6,
            "loss_first": 0.69315,
            "loss_last": 0.512,
            "accuracy_last": 0.75,
            "chosen_logp_change": 1.234,
            "rejected_logp_change": -33.21,
            "reference_from": "engine",
            "engine_gap_token": 4.1e-5,
            "tokens": 9000,
            "seconds": 90.3,
            "tokens_per_second": 104.0,
        },
        "seconds": {"sample": 34.12, "judge": 0.1, "pair": 0.02, "train": 90.34, "evaluate": 21.24},
        "reused": ["sample"],
    }


def rendered(*items: RenderableType, width: int = WIDTH) -> str:
    """What output that is no terminal receives."""
    file = io.StringIO()
    console = Console(file=file, width=width)
    for item in items:
        console.print(item)
    return file.getvalue()


def all_tables(rows: list[dict[str, Any]], width: int = WIDTH) -> str:
    return rendered(round_table(rows), stage_table(rows), budget_table(rows), width=width)


# --- clean ---


@pytest.mark.parametrize(
    ("hostile", "harmless"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;my title\x07rest", "rest"),
        ("\x1b]8;;file:///etc\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]0;no end", "0;no end"),
        ("\x9b2Jgone", "gone"),
        ("\x1bcreset", "reset"),
        ("a\x00b\x07c\x08d\x7fe", "abcde"),
        ("right\u202eleft\u2066x\ufeff", "rightleftx"),
        ("half \ud800 pair", "half  pair"),
        ("one\r\ntwo\rthree\u2028four\x0bfive", "one two three four five"),
        ("a\tb", "a b"),
        ("👩\u200d🚀", "👩\u200d🚀"),
    ],
)
def test_clean(hostile: str, harmless: str) -> None:
    assert clean(hostile) == harmless


def test_clean_keeps_single_line_breaks_where_asked() -> None:
    assert clean("\n one\n\n \n two \r\nthree\n", lines=True) == "one\ntwo \nthree"


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\x1b[]\x9d\x07\\;m0"))))
def test_clean_leaves_nothing_that_a_terminal_obeys(text: str) -> None:
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in clean(text))


# --- figures ---


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "–"),
        ("0.5", "–"),
        (True, "–"),
        (0, "0"),
        (12345, "12345"),
        (0.0, "0.000"),
        (-0.00001, "-0.00001"),
        (0.5, "0.500"),
        (45.678, "45.68"),
        (456.78, "456.8"),
        (45678.9, "45679"),
    ],
)
def test_number(value: object, text: str) -> None:
    assert number(value) == text


def test_number_rounded_to_zero_has_no_minus() -> None:
    assert number(-0.0004, places=2) == "0.00"
    assert number(-0.0004, places=2, sign=True) == "+0.00"


def test_interval_has_one_number_of_places() -> None:
    assert interval(around(0.5, 0.125)) == "0.500 [0.375, 0.625]"
    assert interval({"mean": 0.001, "low": -20.5, "high": 20.5}, sign=True) == "+0.00 [-20.50, +20.50]"


@pytest.mark.parametrize("value", [None, 3, {}, {"mean": None, "low": 1.0, "high": 2.0}, {"mean": float("nan")}])
def test_absent_interval(value: object) -> None:
    assert interval(value) == "–"
    assert share(None if value == 3 else value) == "–"


def test_interval_without_bounds_is_its_mean() -> None:
    assert interval({"mean": 0.5, "low": None, "high": None}) == "0.500"
    assert share({"mean": 0.5, "low": None, "high": None}) == "50 %"


def test_share() -> None:
    assert share(around(0.61, 0.09)) == "61 % [52, 70]"
    assert share(0.3125) == "31 %"


# --- tables ---


def test_the_figures_are_there() -> None:
    text = all_tables([metrics_row(index=0), metrics_row(index=1)])
    for figure in (
        "-0.412 [-0.496, -0.329]",
        "+0.123 [+0.073, +0.173]",
        "61 % [52, 70]",
        "123.4 [103.4, 143.4]",
        "23.40 [13.40, 33.40]",
        "58.4",
        "31 %",
        "below_margin 4, tie 3",
        "0.693 → 0.512",
        "-33.21",
        "4.1e-05",
        "171",
        "104",
        "34.1*",
        "90.3",
        "64 prompts",
    ):
        assert figure in text
    assert "same_text" not in text, "a reason that dropped nothing is not named"


def test_budget_sums_rounds_of_an_arm_and_seed() -> None:
    rows = [metrics_row(seed=seed, index=index) for seed in (0, 1) for index in (0, 1, 2)]
    lines = [line.split() for line in rendered(budget_table(rows)).splitlines() if "on_policy" in line]
    # arm, seed, rounds, answers 2·96, tokens 2·5800, judged 2·(94+2), pairs 2·22, steps 2·6, answers trained on
    # 2·44, tokens 2·9000, seconds 3·21.24 + 2·(34.12 + 0.1 + 0.02 + 90.34) = 312.88
    assert lines == [
        ["on_policy", seed, "2", "192", "11600", "192", "44", "12", "88", "18000", "313"] for seed in ("0", "1")
    ]


def test_tables_fit_a_hundred_columns_without_wrapping() -> None:
    rows = [
        metrics_row(arm, seed, index) for seed in (0, 1) for arm in ("on_policy", "self_offline") for index in (0, 1)
    ]
    lines = all_tables(rows).splitlines()
    assert max(map(len, lines)) <= WIDTH
    named = [line for line in lines if line.startswith(("on_policy", "self_offline"))]
    # 8 rows in the three tables of the held-out answers and in that of speed, 4 in pairs, training and budget.
    assert len(named) == 4 * 8 + 3 * 4
    assert not any(line.startswith("  ") and line.strip() for line in lines), "a row goes on in a second line"


def test_narrow_terminal_cuts_nothing_off() -> None:
    text = all_tables([metrics_row()], width=72)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 72


def test_seed_is_shown_only_where_there_are_several() -> None:
    assert "seed  " not in rendered(round_table([metrics_row()]))
    assert "seed  " in rendered(round_table([metrics_row(), metrics_row(seed=1)]))


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"arm": "a", "seed": 0, "round": 1, "held_out": None, "train": {}, "pairs": [], "seconds": 3, "reused": None},
        {"arm": "a", "seed": 0, "round": 1, "held_out": {"reward": {"mean": None, "low": None, "high": None}}},
    ],
)
def test_absent_figures_are_dashes(row: dict[str, Any]) -> None:
    text = all_tables([row])
    assert "–" in text
    assert "None" not in text
    assert "nan" not in text


def test_no_rounds_at_all() -> None:
    assert "Held-out reward" in all_tables([])


def test_hostile_names_and_reasons_are_text() -> None:
    row = metrics_row(arm="[red]a[/red]\x1b[2J")
    row["pairs"]["dropped"] = {"[blink]tie\x1b]0;x\x07": 3}
    text = all_tables([row])
    assert "[red]a[/red]" in text
    assert "[blink]tie 3" in text
    assert "\x1b" not in text


def test_hostile_answers_are_text() -> None:
    shown = ShownPrompt(
        "Write [link=file:///x]this[/link]\x1b[8m now",
        (
            ShownAnswer("initial", "[/bold] unbalanced [red]markup[/]\n\n\n\nend\\", -0.25),
            ShownAnswer("on_policy, round 3", "\x1b[2J\x1b]52;c;AAAA\x07:smile: \ud800 ok"),
            ShownAnswer("empty", "\x00"),
        ),
    )
    text = rendered(sample_answers([shown]))
    assert "[link=file:///x]this[/link] now" in text
    assert "[/bold] unbalanced [red]markup[/]" in text
    assert "end\\" in text
    assert ":smile:" in text
    assert "-0.250" in text
    assert "(empty)" in text
    assert "\x1b" not in text
    assert "AAAA" not in text
    text.encode("utf-8")


def test_long_answers_are_cut_and_say_so() -> None:
    text = rendered(sample_answers([ShownPrompt("p", (ShownAnswer("initial", "word " * 5000),))]))
    assert "…" in text
    assert len(text) < 5000


# --- progress ---


def plain(every: float = 10.0) -> tuple[PlainProgress, Clock, io.StringIO]:
    file = io.StringIO()
    clock = Clock()
    return PlainProgress(Console(file=file, width=WIDTH), every=every, clock=clock), clock, file


def test_plain_lines_are_rare_and_tell_rate_and_time_left() -> None:
    progress, clock, file = plain()
    progress.start("arm · sample", 100, "answers")
    for _ in range(10):
        clock.now += 4.0
        progress.advance(10, "170 tokens/s")
    progress.finish()
    assert file.getvalue().splitlines() == [
        # 30 of 100 after 12 s: 2.5 a second, 70 / 2.5 = 28 s left
        "arm · sample: 30 of 100 answers, 2.5/s, 0:28 left, 170 tokens/s",
        "arm · sample: 60 of 100 answers, 2.5/s, 0:16 left, 170 tokens/s",
        "arm · sample: 90 of 100 answers, 2.5/s, 0:04 left, 170 tokens/s",
        "arm · sample: 100 answers in 40.0 s, 2.5/s, 170 tokens/s",
    ]


def test_plain_slow_rates_and_long_times() -> None:
    progress, clock, file = plain()
    progress.start("train", 1000, "pairs")
    clock.now = 100.0
    progress.advance(4)
    assert file.getvalue().strip() == "train: 4 of 1000 pairs, 0.040/s, 6:55:00 left"


def test_a_stage_that_was_cut_short_is_not_called_done() -> None:
    progress, clock, file = plain()
    with progress:
        progress.start("train", 10, "pairs")
        clock.now = 1.0
    assert file.getvalue() == ""


def test_plain_output_of_hostile_lines() -> None:
    progress, _, file = plain()
    progress.say("[red]stopped[/red]: \x1b[31mjudge\nsaid\x07 no")
    assert file.getvalue() == "[red]stopped[/red]: judge said no\n"


def test_long_lines_are_not_wrapped() -> None:
    progress, _, file = plain()
    progress.say("x" * 500)
    assert file.getvalue() == "x" * 500 + "\n"


def test_quiet_says_nothing_and_the_display_fits_the_console() -> None:
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=WIDTH)
    assert type(make_progress(True, terminal)) is QuietProgress
    assert type(make_progress(False, terminal)) is RichProgress
    assert type(make_progress(False, Console(file=file))) is PlainProgress
    with make_progress(True, terminal) as progress:
        progress.start("a", 1, "b")
        progress.advance(1)
        progress.finish()
        progress.say("c")
    assert file.getvalue() == ""


def test_terminal_shows_a_bar_and_leaves_a_line() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=WIDTH, color_system=None)
    with RichProgress(console) as progress:
        progress.start("[red]arm[/red]", 4, "pairs")
        progress.advance(2, "loss 0.6")
        progress.say("[b]a line[/b]")
        progress.advance(2)
        progress.finish()
        progress.start("cut short", 4, "pairs")
    text = file.getvalue()
    assert "4/4 pairs" in text
    assert "[b]a line[/b]" in text
    assert "[red]arm[/red]: 4 pairs in " in text
    assert "cut short:" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is shown again"


def test_stages_of_several_threads_have_a_bar_each() -> None:
    """One below the other while both go on; each leaves its line. The first display's end takes all of them away."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=WIDTH, color_system=None)
    with RichProgress(console) as progress:
        beside = progress.beside()
        progress.start("one", 4, "pairs")
        beside.start("two", 3, "answers")
        progress.advance(4)
        progress.finish()
        beside.advance(3)
        beside.finish()
        beside.start("cut short", 4, "pairs")
    text = file.getvalue()
    assert "one: 4 pairs in " in text and "two: 3 answers in " in text
    assert "3/3 answers" in text
    assert "cut short:" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is shown again"


def test_advance_without_a_stage_is_harmless() -> None:
    progress, _, file = plain()
    progress.advance(1)
    progress.finish()
    assert file.getvalue() == ""
