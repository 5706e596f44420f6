"""A real run's exported pairs, trained on by TRL's DPOTrainer as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stories import run
from typer.testing import CliRunner

from online_dpo.cli import app
from online_dpo.records import read_candidates, read_prompts


@pytest.mark.slow
def test_trl_trains_on_the_exported_file_as_it_is(tmp_path: Path, stories: Path) -> None:
    """A real run of stories260k; DPOTrainer makes of the file the tokens that the run trained on, but for the end
    token that it adds to answers that were cut off, and takes a step."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    arms: dict[str, Any] = {"on_policy": {}}
    outcome = run(tmp_path, stories, "tiny", arms=arms, rounds=1)
    assert outcome.status == 0, outcome.stderr
    result = CliRunner().invoke(app, ["export", str(outcome.root), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    exported = load_dataset("parquet", data_files=str(tmp_path / "out" / "pairs.parquet"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(stories)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(stories),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            bf16=False,
        ),
        train_dataset=exported,
        processing_class=tokenizer,
    )  # fmt: skip
    folder = outcome.folder("on_policy", 1)
    prompts = {prompt.id: prompt for prompt in read_prompts(outcome.root / "prompts.parquet")["train"]}
    answers = {(c.prompt_id, c.index): c for c in read_candidates(folder / "candidates.parquet")}
    pairs = load_dataset("parquet", data_files=str(folder / "pairs.parquet"), split="train")
    end = tokenizer.eos_token_id
    assert len(trainer.train_dataset) == len(pairs) > 0
    for made, pair in zip(trainer.train_dataset, pairs, strict=True):
        assert tuple(made["prompt_ids"]) == prompts[pair["prompt_id"]].token_ids
        for side in ("chosen", "rejected"):
            sampled = list(answers[pair["prompt_id"], pair[f"{side}_index"]].token_ids)
            assert made[f"{side}_ids"] == (sampled if sampled[-1] == end else [*sampled, end])
    assert trainer.train().global_step == 1
