"""Real runs that begin with supervised fine-tuning, and the arms that stand beside DPO: RLOO, and SFT on the best."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from stories import NAMES, Outcome, Started, run, write_experiment

from online_dpo.files import digest
from online_dpo.policies import read_policy
from online_dpo.records import read_held_out

pytestmark = pytest.mark.slow

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes of Ray that end only after about a minute."""
GIVEN = [("a blue car", "train"), ("a small cat", "train"), ("a new hat", "train"), ("a tall man", "test")]
ENDS = ("was happy and went to bed.", "was sad.", "saw a bird in the big tree and ran.", "liked to play.")
"""Answers must go on to differ in length, or there are no pairs."""
SFT = {"dataset": "given.jsonl", "lr": 2e-3, "batch_size": 8, "epochs": 12}
ARMS = {
    "on_policy": {},
    "best": {"dpo": {"loss": "sft"}},
    "rloo": {"algorithm": "rloo", "rloo": {"standardise": True}},
}


def rows(split: str) -> list[dict[str, str]]:
    return [
        {"prompt": f"Once upon a time, {name} had {thing}.", "response": f"{name} {ENDS[(i + j) % 4]} The end."}
        for i, name in enumerate(NAMES)
        for j, (thing, of) in enumerate(GIVEN)
        if of == split
    ]


def with_given(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(row) for row in rows("train"))
    (folder / "given.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def outcome(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """SFT, then one round of each arm, as adapters: the fine-tuned model is a whole one all the same."""
    folder = with_given(tmp_path_factory.mktemp("sft"))
    return run(folder, stories, "learned", sft=SFT, arms=ARMS, rounds=1, lora={"rank": 4}, seeds=[0])


def nll(folder: Path, model_folder: Path) -> float:
    """−log π/|y| of answers to prompts that no row of the dataset has, by plain transformers: mean over answers."""
    import torch
    from transformers import AutoModelForCausalLM

    from online_dpo.answers import AnswerEncoder
    from online_dpo.model_config import end_token_ids
    from online_dpo.models import load_tokenizer
    from online_dpo.types import Message

    encoder = AnswerEncoder(load_tokenizer(model_folder), end_token_ids(model_folder))
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    total = 0.0
    for row in rows("test"):
        messages = (Message("user", row["prompt"]),)
        prompt, answer = encoder.prompt(messages), encoder.answer(messages, row["response"])
        assert answer is not None
        with torch.no_grad():
            logs = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= float(logs.gather(-1, torch.tensor(answer)[:, None]).mean())
    return total / len(rows("test"))


def test_it_ends_well(outcome: Outcome) -> None:
    assert outcome.status == 0, outcome.stderr
    assert outcome.stderr.startswith("sft: 288 answers in ")
    for part in (
        "Training by RLOO",
        "answers",
        "loss of rloo: rloo, kl 0.05",
        "loss of best: sft on the chosen answers",
    ):
        assert part in outcome.stdout
    assert max(map(len, outcome.stdout.splitlines())) <= 100


def test_fine_tuning_lowers_the_loss_on_held_out_answers(outcome: Outcome, stories: Path, one_thread: None) -> None:
    before, after = nll(stories, stories), nll(outcome.root / "sft" / "policy", stories)
    assert after < 0.6 * before
    record = json.loads((outcome.root / "sft" / "stages" / "sft.json").read_text(encoding="utf-8"))
    info = record["info"]
    assert (info["rows"], info["answers"], info["steps"]) == (24, 24, 36)
    assert info["loss_last"] < 0.5 * info["loss_first"]
    assert len(info["curve"]) == 36


def test_the_fine_tuned_model_is_what_arms_begin_with_and_are_measured_against(outcome: Outcome) -> None:
    """Round 0 samples from it and ends its answers as it was taught to; KL to initial means to it."""
    policy = read_policy(outcome.root / "sft" / "policy")
    assert not policy.adapter
    for arm in ARMS:
        assert outcome.metrics(arm, 0)["policy"] == {"id": "initial", "digest": policy.digest}
        assert outcome.metrics(arm, 1)["reference"] == {"id": "initial", "digest": policy.digest}
    start = read_held_out(outcome.folder("on_policy", 0) / "held_out.parquet")
    assert sum("The end." in answer.candidate.text for answer in start) >= 6
    assert sum(answer.candidate.finish_reason == "stop" for answer in start) >= 4
    end = read_held_out(outcome.folder("on_policy", 1) / "held_out.parquet")
    assert any(
        sum(answer.candidate.logprobs) != pytest.approx(sum(answer.initial_logprobs), abs=0.01) for answer in end
    )


def test_the_round_after_it_begins_at_ln_2(outcome: Outcome) -> None:
    """The adapters sit on the fine-tuned model: policy = reference, and the engine's log-probs are the learner's."""
    train = outcome.metrics("on_policy", 1)["train"]
    assert abs(train["loss_first"] - math.log(2)) <= 0.1 * train["engine_gap_sequence"] + 1e-5
    assert train["reference_from"] == "engine"
    assert train["engine_gap_token"] <= 1e-4


def test_what_the_other_arms_trained_on(outcome: Outcome) -> None:
    """The same candidates and verdicts; no figure of pairs where none were trained on."""
    pairs, best, rloo = (outcome.metrics(arm, 1) for arm in ARMS)
    assert sorted(best["reused"]) != [] or sorted(pairs["reused"]) != []
    assert {row["sample"]["candidates"] for row in (pairs, best, rloo)} == {18}
    found = [(row["train"]["trained"], row["train"]["answers"], row["train"]["steps"]) for row in (pairs, best, rloo)]
    kept = pairs["pairs"]["kept"]
    assert found == [("pairs", 8 * kept, 2 * kept), ("chosen", 4 * kept, 2 * kept), ("groups", 72, 12)]
    for row in (best, rloo):
        assert (
            row["train"]["margin_last"] is row["train"]["accuracy_last"] is row["train"]["chosen_logp_change"] is None
        )
    assert rloo["train"]["curve"][0]["kl"] == pytest.approx(0.0, abs=1e-3)
    assert best["train"]["loss_last"] < best["train"]["loss_first"]


def test_killed_in_the_middle_of_fine_tuning_it_ends_with_the_same_bytes(
    outcome: Outcome, stories: Path, tmp_path: Path
) -> None:
    """kill -9 once a checkpoint lies there; resuming makes the model that nobody interrupted."""
    folder = with_given(tmp_path)
    slow = {**SFT, "epochs": 30}
    root = write_experiment(
        folder, stories, "learned", sft=slow, arms={"on_policy": {}}, rounds=1,
        learner={"threads": 1, "save_every": 10},
    )  # fmt: skip
    started = Started(folder, "run", "experiment.yaml")
    started.wait_for((root / "sft" / ".sft.checkpoint" / "state.json").exists)
    started.kill()
    assert started.outlived(20, AGENTS) == []
    assert not (root / "sft" / "stages").exists()
    resumed = Started(folder, "resume", str(root))
    assert resumed.end() == 0
    assert not list((root / "sft").glob(".sft*"))
    whole = run(with_given(tmp_path / "whole"), stories, "learned", sft=slow, arms={"on_policy": {}}, rounds=1)
    assert digest(root / "sft" / "policy") == digest(whole.root / "sft" / "policy")


@pytest.mark.parametrize("lora", [None, {"rank": 8}], ids=["full", "lora"])
def test_rloo_raises_what_the_judge_scores(stories: Path, tmp_path: Path, lora: dict[str, int] | None) -> None:
    """Three rounds on the length of answers in characters: the held-out ones are longer by more than a tenth."""
    result = run(
        tmp_path,
        stories,
        "longer",
        arms={"rloo": {"algorithm": "rloo"}},
        rloo={"standardise": True, "kl": 0.02},
        reference="initial",
        rounds=3,
        prompts={"path": "prompts.jsonl", "per_round": 12, "held_out": 12},
        sampling={"n": 6, "max_tokens": 24},
        dpo={"lr": 1e-3 if lora is None else 5e-3, "batch_size": 3, "epochs": 2},
        **({} if lora is None else {"lora": lora}),
    )
    assert result.status == 0, result.stderr
    rewards = [result.metrics("rloo", index)["held_out"]["reward"]["mean"] for index in range(4)]
    assert rewards[3] > 1.1 * rewards[0]
    change = result.metrics("rloo", 3)["held_out"]["reward_change"]
    assert change["low"] > 0
    curves = [result.metrics("rloo", index)["train"]["curve"] for index in (1, 2, 3)]
    assert curves[0][0]["kl"] == pytest.approx(0.0, abs=1e-3)
    assert all(len(curve) == 8 and {"loss", "reward", "kl", "grad_norm"} == set(curve[0]) for curve in curves)
