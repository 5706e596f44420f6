"""A real run on a file of HH-RLHF's form: its prompts, its pairs (offline), its answers against the policy's (SPIN)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from stories import NAMES, THINGS, Outcome, run

from online_dpo.records import read_candidates, read_prompts

pytestmark = pytest.mark.slow

CHANGES: dict[str, Any] = {
    "prompts": {"path": "hh.jsonl", "template": "dialogue", "per_round": 6, "held_out": 8},
    "sampling": {"n": 1, "max_tokens": 24},
    "arms": {"offline": {"source": {"dataset": "hh.jsonl"}}, "spin": {"source": {"spin": "hh.jsonl"}}},
}


def write_pairs(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (name, thing) in enumerate((name, thing) for name in NAMES for thing in THINGS):
        asked = f"What did {name} have on day {number}?"
        said = f"\n\nHuman: Hello.\n\nAssistant: Hi, {name}!\n\nHuman: {asked}\n\nAssistant:"
        rows.append({"chosen": f"{said} {name} had {thing}.", "rejected": f"{said} I do not know {number}."})
    (folder / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def outcome(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("offline")
    write_pairs(folder)
    return run(folder, small_model, "offline", **CHANGES)


@pytest.mark.parametrize("arm", ["offline", "spin"])
def test_every_round_begins_at_ln_2_and_learns(outcome: Outcome, arm: str) -> None:
    """No policy's stored log-probs are the reference's, so one pass of the learner computes them: no gap at all."""
    assert outcome.status == 0, outcome.stderr
    for index in (1, 2):
        metrics = outcome.metrics(arm, index)
        train = metrics["train"]
        assert abs(train["loss_first"] - math.log(2)) <= 1e-5
        assert (train["reference_from"], train["engine_gap_token"]) == ("learner", None)
        assert train["loss_last"] < math.log(2)
        assert (metrics["pairs"]["kept"], metrics["source"], metrics["judge"]["verdicts"]) == (6, None, 0)
    assert outcome.metrics("offline", 1)["sample"]["tokens"] == 0
    assert outcome.metrics("spin", 1)["sample"]["tokens"] > 0


def test_tokens_are_the_dialogues(outcome: Outcome, small_model: Path) -> None:
    from online_dpo.models import load_tokenizer

    tokenizer: Any = load_tokenizer(small_model)
    prompts = {prompt.id: prompt for prompt in read_prompts(outcome.root / "prompts.parquet")["train"]}
    whole = {(row["chosen"], row["rejected"]) for row in _rows(outcome.root.parents[1] / "hh.jsonl")}
    offline = read_candidates(outcome.folder("offline", 1) / "candidates.parquet")
    spin = [c for c in read_candidates(outcome.folder("spin", 1) / "candidates.parquet") if c.index == 0]
    texts = [
        tokenizer.decode([*prompts[c.prompt_id].token_ids, *c.token_ids], skip_special_tokens=True).strip()
        for c in (*offline, *spin)
    ]
    assert all(c.token_ids[-1] == tokenizer.eos_token_id for c in (*offline, *spin))
    pairs = set(zip(texts[:12:2], texts[1:12:2], strict=True))
    assert pairs <= {(chosen.strip(), rejected.strip()) for chosen, rejected in whole}
    assert [c.text for c in spin] == [c.text for c in offline[::2]]  # the same prompts, the same answers


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
