"""One round twice: our learner's, and that of TRL's DPOTrainer on the same tokens, weights, reference and order."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_parts import LORA, job_of, learner_of, result_of

from online_dpo.backends.learner import LocalLearner, batch_order
from online_dpo.config import DPOSpec
from online_dpo.models import load_tokenizer
from online_dpo.types import Candidate, Message, Pair, Policy, Prompt

SEED = 0
"""Of the order of the pairs."""
CPU = torch.device("cpu")
TEXTS = (
    ("Once upon a time", ", there was a little girl named Lily.", " the dog ran"),
    ("Tom had a red ball.", " He liked it.", " He was sad because the ball was old and he could not find his mum."),
    ("The dog", " saw a big cat in the park.", " was very happy to play with him."),
    ("Once upon a time", ", a bird sat on a tree and sang all day long. Everyone was happy.", " no no no no"),
    ("One day, a bird", " flew.", " wanted to eat the cake, but it was too hot."),
    ("It was a very cold night and", " Ben wore his hat.", " Ben ate."),
    ("Mia", " and her mum went to the store to buy some milk and bread.", " said no and ran away from the house."),
    ("The dog", " ran.", " saw a big cat in the park."),
)
"""Prompt, chosen and rejected answer: of all lengths, two prompts and an answer more than once."""


@dataclass(frozen=True)
class Curve:
    """What each optimiser step reported, [steps] float64 each: mean loss, gradient norm before clipping, mean βΔ."""

    loss: Tensor
    grad_norm: Tensor
    margin: Tensor

    def off(self, truth: Curve, times: float = 1.0) -> float:
        """Largest difference of a loss or norm from `times` the truth's, relative to that."""
        mine = torch.stack([self.loss, self.grad_norm])
        other = times * torch.stack([truth.loss, truth.grad_norm])
        # A batch without a loss (hinge) has no gradient either: 0 of 0.
        return float(torch.where(mine == other, 0.0, (mine - other).abs() / other.abs()).max())


@dataclass(frozen=True)
class Stage:
    """What both sides begin with: the learner, and the policies that are trained and referred to."""

    learner: LocalLearner
    initial: Policy
    policy: Policy
    reference: Policy
    pairs: tuple[Pair, ...]

    def first(self, dpo: DPOSpec) -> tuple[Tensor, Tensor, Tensor]:
        """Of the first step's pairs: log π and log π_ref of both answers, end token included, and their lengths.

        Each [pairs, 2] float64, chosen answers first.
        """
        pairs = [self.pairs[i] for i in batch_order(len(self.pairs), dpo, SEED)[0]]
        items = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
        scored = [self.learner.score(policy, items) for policy in (self.policy, self.reference)]
        pi, ref = (torch.tensor([sum(values) for values in of], dtype=torch.float64).view(-1, 2) for of in scored)
        lengths = torch.tensor([len(answer.token_ids) for _, answer in items], dtype=torch.float64).view(-1, 2)
        return pi, ref, lengths


def settings(**changes: Any) -> DPOSpec:
    """Ten steps of four pairs, every pair in five of them; no warm-up, nothing clipped."""
    common = {"beta": 0.1, "lr": 2e-4, "batch_size": 4, "epochs": 5, "warmup": 0.0, "clip": 1e9}
    return DPOSpec.model_validate(common | changes)


def stage_of(initial: Policy, reference: Policy, policy: Policy | None = None) -> Stage:
    """Training starts at `policy`: an adapter, or None for the initial weights, all of them trained."""
    learner = learner_of(initial, device=CPU, dtype="float32", lora=None if policy is None else LORA)
    pairs = tuple(pair_of(initial.path, f"p{i}", *texts) for i, texts in enumerate(TEXTS))
    stored = learner.score(initial, [(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)])
    sides = zip(pairs, stored[::2], stored[1::2], strict=True)
    pairs = tuple(replace(p, chosen=_known(p.chosen, w), rejected=_known(p.rejected, r)) for p, w, r in sides)
    return Stage(learner, initial, policy or initial, reference, pairs)


def pair_of(folder: Path, name: str, prompt: str, chosen: str, rejected: str) -> Pair:
    """The texts as token ids: the begin token, the prompt, the answer that goes on from it, the end token."""
    tokenizer: Any = load_tokenizer(folder)

    def ids(text: str) -> tuple[int, ...]:
        return (tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(text: str, index: int) -> Candidate:
        whole = ids(prompt + text)
        assert whole[: len(head)] == head
        tokens = (*whole[len(head) :], tokenizer.eos_token_id)
        return Candidate(name, index, text, tokens, (0.0,) * len(tokens), "stop", seed=index)

    head = ids(prompt)
    asked = Prompt(name, (Message("user", prompt),), head)
    return Pair(asked, answer(chosen, 0), answer(rejected, 1), chosen_score=1.0, rejected_score=0.0)


def _known(answer: Candidate, logprobs: Sequence[float]) -> Candidate:
    return replace(answer, logprobs=tuple(logprobs))


def ours(stage: Stage, dpo: DPOSpec) -> Curve:
    """`LocalLearner.train`."""
    with tempfile.TemporaryDirectory() as out:
        job = job_of(
            stage.initial, stage.pairs, dpo, Path(out), policy=stage.policy, reference=stage.reference, seed=SEED
        )
        start, steps, _ = result_of(stage.learner, job)
    assert start.reference_from == "learner"
    reported = [(step.loss, step.grad_norm, step.margin) for step in steps]
    return Curve(*torch.tensor(reported, dtype=torch.float64).unbind(1))


def theirs(stage: Stage, dpo: DPOSpec, **changes: Any) -> Curve:
    """`DPOTrainer.train` with its own tokenisation; `changes`: TRL's options beside those that `dpo` gives."""
    from datasets import Dataset
    from trl import DPOTrainer

    batches = batch_order(len(stage.pairs), dpo, SEED)
    order = [i for batch in batches for i in batch]
    rows = [dict(zip(("prompt", "chosen", "rejected"), TEXTS[i], strict=True)) for i in order]
    model, reference = _models(stage)
    with tempfile.TemporaryDirectory() as out:
        trainer = DPOTrainer(
            model=model,
            ref_model=reference,
            args=_config(out, dpo, changes),
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(stage.initial.path),
        )
        _require_same_tokens(trainer.train_dataset, [stage.pairs[i] for i in order])
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(batches)
    reported = [(entry["loss"], entry["grad_norm"], entry["rewards/margins"]) for entry in logs]
    return Curve(*torch.tensor(reported, dtype=torch.float64).unbind(1))


def _config(out: str, dpo: DPOSpec, changes: dict[str, Any]) -> Any:
    from trl import DPOConfig

    common = {
        "beta": dpo.beta,
        "per_device_train_batch_size": dpo.batch_size,
        "learning_rate": dpo.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": dpo.adam_beta1,
        "adam_beta2": dpo.adam_beta2,
        "adam_epsilon": 1e-8,
        "weight_decay": dpo.weight_decay,
        "max_grad_norm": dpo.clip,
    }
    return DPOConfig(
        output_dir=out,
        num_train_epochs=1,  # the rows are those of all epochs already
        train_sampling_strategy="sequential",
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,  # loss and norm are logged unrounded
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(common | changes),
    )


def _models(stage: Stage) -> tuple[Any, Any]:
    """Policy and reference as TRL wants them: a reference of an adapter merged into a model of its own."""
    from peft import PeftModel

    policy, reference = _plain(stage.initial), _plain(stage.initial)
    if not stage.policy.adapter:
        return policy, _plain(stage.reference)
    trained = PeftModel.from_pretrained(policy, stage.policy.path, is_trainable=True)
    return trained, PeftModel.from_pretrained(reference, stage.reference.path).merge_and_unload()


def _plain(policy: Policy) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(policy.path, dtype=torch.float32)


def _require_same_tokens(dataset: Any, pairs: Sequence[Pair]) -> None:
    for row, pair in zip(dataset, pairs, strict=True):
        assert tuple(row["prompt_ids"]) == pair.prompt.token_ids
        assert tuple(row["chosen_ids"]) == pair.chosen.token_ids
        assert tuple(row["rejected_ids"]) == pair.rejected.token_ids
