"""Where a round's pairs come from: one module a kind of source, and `gather`, which chooses."""

from online_dpo.sources.gather import gather as gather
from online_dpo.sources.gather import round_prompts as round_prompts
from online_dpo.sources.refresh import refresh_figures as refresh_figures
from online_dpo.sources.round_data import RoundData as RoundData
