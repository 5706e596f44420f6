"""From run folders to a report: the sections, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from online_dpo.compare import Comparison
from online_dpo.measure import Interval
from online_dpo.report.answers import MOST, collect_answers
from online_dpo.report.data import ReportedRun
from online_dpo.report.document import Report, Section
from online_dpo.report.sections.compared import compared
from online_dpo.report.sections.curves import curves
from online_dpo.report.sections.displacement import displacement
from online_dpo.report.sections.frontier import frontier
from online_dpo.report.sections.judges import judges
from online_dpo.report.sections.league import league
from online_dpo.report.sections.lengths import lengths
from online_dpo.report.sections.matrix import win_matrix
from online_dpo.report.sections.off_policy import off_policy
from online_dpo.report.sections.outcome import verdict, warnings
from online_dpo.report.sections.prices import prices
from online_dpo.report.sections.reproduce import reproduce
from online_dpo.report.subject import Subject

ANSWERS = "answers"
"""The name of the section that holds the answer browser."""


def build_report(
    runs: Sequence[ReportedRun],
    comparison: Comparison,
    controlled: Mapping[str, Interval],
    most_answers: int = MOST,
) -> Report:
    """The report of `runs`, whose held-out answers `comparison` compares; `controlled` as in `Subject`."""
    subject = Subject(runs, comparison, controlled)
    answers = collect_answers(runs, most_answers)
    sections = (
        compared(subject),
        verdict(subject),
        warnings(subject),
        frontier(subject),
        win_matrix(subject),
        curves(subject),
        off_policy(subject),
        displacement(subject),
        lengths(subject),
        judges(subject),
        prices(subject),
        league(subject),
        _answers(answers["left_out"], len(answers["prompts"])),
        reproduce(subject),
    )
    names = ", ".join(run.experiment.name for run in runs)
    rounds = max((row["round"] for run in runs for row in run.rows), default=0)
    seeds = sorted({seed for run in runs for seed in run.experiment.seeds})
    parts = [(len(subject.arms), "arm"), (len(seeds), "seed"), (rounds, "round")]
    subtitle = " × ".join(f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in parts)
    return Report(names, subtitle, comparison.verdict, sections, answers)


def _answers(left_out: int, shown: int) -> Section:
    text = "Every answer to a held-out prompt, of every arm and round, side by side, with what the judges said of it."
    if left_out:
        text += f" {shown} prompts are here; {left_out} more were left out, to keep the page small."
    return Section(ANSWERS, "Answers", (text,))
