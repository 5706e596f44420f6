"""A run's data for other programs: pairs as TRL's DPOTrainer takes them, or every stage's file as it lies."""

from online_dpo.export.selection import Selection as Selection
from online_dpo.export.selection import check_selection as check_selection
from online_dpo.export.selection import parse_rounds as parse_rounds
from online_dpo.export.stages import export_stages as export_stages
from online_dpo.export.trl import export_trl as export_trl
