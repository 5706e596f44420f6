"""What a person sees of a run: progress while it works, tables of its figures, answers before and after."""

from __future__ import annotations

from online_dpo.display.answers import ShownAnswer, ShownPrompt, sample_answers
from online_dpo.display.budget import budget_table
from online_dpo.display.console import WIDTH, make_console
from online_dpo.display.figures import ABSENT, interval, number, share
from online_dpo.display.held_out import round_table
from online_dpo.display.judge import judge_table
from online_dpo.display.off_policy import off_policy_table
from online_dpo.display.progress import PlainProgress, QuietProgress, RichProgress, make_progress
from online_dpo.display.stages import stage_table
from online_dpo.display.text import clean

__all__ = [
    "ABSENT",
    "WIDTH",
    "PlainProgress",
    "QuietProgress",
    "RichProgress",
    "ShownAnswer",
    "ShownPrompt",
    "budget_table",
    "clean",
    "interval",
    "judge_table",
    "make_console",
    "make_progress",
    "number",
    "off_policy_table",
    "round_table",
    "sample_answers",
    "share",
    "stage_table",
]
