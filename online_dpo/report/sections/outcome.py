"""The verdict in one sentence, every difference behind it, and what to be careful about."""

from __future__ import annotations

from dataclasses import replace

from online_dpo.compare import Difference, Measure
from online_dpo.confounding import confounded_settings
from online_dpo.measure import Interval
from online_dpo.report.document import Cell, Section, Table, bounds, chance, count, figure, percent, words
from online_dpo.report.subject import Subject

TITLES: dict[Measure, str] = {
    "reward": "Reward by the held-out judge, a − b",
    "gold": "Reward by the gold judge, a − b",
    "win_rate": "Prompts on which a wins against b, ties half",
    "length_controlled": "The same at equal length (length-controlled)",
    "equal_kl": "Reward where both are equally far from the initial policy (the gold judge's if there is one), a − b",
}
SHARES: tuple[Measure, ...] = ("win_rate", "length_controlled")
NOTE = (
    "each arm at its selected round; brackets: 95 % intervals over prompts and seeds; p corrected: Holm's, over all "
    "differences in a table; more prompts, more seeds: about how many would decide it; KL: nats an answer, as far as "
    "the shorter of the two paths goes, rewards between two rounds read off a straight line in √KL"
)


def verdict(subject: Subject) -> Section:
    """The sentence, the rounds that stand for the arms, and the differences by every measure."""
    tables = [table for measure in TITLES if (table := _differences(subject, measure)).rows]
    # One note for all of them, below the last.
    tables[-1:] = [replace(table, note=NOTE) for table in tables[-1:]]
    selected = Table(
        "selected",
        "The round that stands for each arm",
        ("arm", "seed", "round"),
        tuple((words(one.arm), count(one.seed), count(one.round)) for one in subject.comparison.selected),
        folded=True,
    )
    return Section("verdict", "The verdict", (subject.comparison.verdict,), tables=(*tables, selected))


def warnings(subject: Subject) -> Section:
    """What the comparison warns of, what is missing from the runs, and what their settings confound."""
    unfinished = [sentence for run in subject.runs for sentence in run.unfinished()]
    confounds = [sentence for run in subject.runs for sentence in confounded_settings(run.experiment)]
    found = tuple(dict.fromkeys([*subject.comparison.warnings, *unfinished, *confounds]))
    text = () if found else ("There are none.",)
    over = subject.comparison.over_optimised
    table = Table(
        "over_optimised",
        "Over-optimisation: after this round the gold reward fell while the training judge's rose",
        ("arm", "seed", "best round", "last round", "judge's rise", "gold's fall"),
        tuple(
            (
                words(one.arm),
                count(one.seed),
                count(one.peak),
                count(one.last),
                bounds(one.proxy_rise, sign=True),
                bounds(one.gold_fall, sign=True),
            )
            for one in over
        ),
    )
    return Section("warnings", "Warnings", text, items=found, tables=(table,) if over else ())


def _differences(subject: Subject, measure: Measure) -> Table:
    rows = [_row(one, measure) for one in subject.comparison.differences if one.measure == measure]
    name = "difference" if measure not in SHARES else "share"
    level = ("KL",) if measure == "equal_kl" else ()
    rest = ("verdict", "p", "p corrected", "prompts", "seeds", "more prompts", "more seeds")
    columns = ("a", "b", *level, name, *rest)
    return Table(f"differences_{measure}", TITLES[measure], columns, tuple(rows))


def _row(one: Difference, measure: Measure) -> tuple[Cell, ...]:
    return (
        words(one.a),
        words(one.b),
        *(() if one.kl is None else (figure(one.kl, places=2),)),
        _interval(one.interval, measure),
        words(one.verdict),
        chance(one.p),
        chance(one.p_corrected),
        count(one.prompts),
        count(one.seeds),
        count(one.more_prompts),
        count(one.more_seeds),
    )


def _interval(value: Interval, measure: Measure) -> Cell:
    return percent(value) if measure in SHARES else bounds(value, sign=True)
