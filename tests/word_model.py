"""A language model of sixty words that learns in microseconds: whole runs with real figures, for what reads them.

A policy is one logit a word; an answer is words drawn until the end word. So log-probs, KL and DPO's gradient are
exact, and arms that train on other pairs really differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fakes import Spoken
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from online_dpo.arms import Run
from online_dpo.config import Experiment, SamplingSpec, validate_experiment
from online_dpo.loop import run_experiment
from online_dpo.models import digest_folder
from online_dpo.policies import write_policy
from online_dpo.protocols import SampleRequest, TrainJob, TrainStart, TrainStep
from online_dpo.records import write_prompts
from online_dpo.store import RunStore
from online_dpo.types import Candidate, Message, Pair, Policy, Probe, Prompt

TEXT = (
    "<end> a the one old small big red green cold warm bird dog cat fox child tree house river garden night morning"
    " sang ran slept fell jumped sat looked went came and then but so because very quite in at under over near with"
    " wonderful happy bright kind lovely sad dark awful broken lonely café 日本 🌳 suddenly never always . , ! ?"
)
WORDS = tuple(TEXT.split())
THINGS = ("garden", "river", "night train", "red fox", "old house", "lost key", "first snow", "market", "harbour")
HERE = Path(__file__).resolve().parent
Floats = NDArray[np.float64]


def word_prompt(number: int) -> Prompt:
    """Prompt `number`, a chat of one or three turns."""
    asked = Message("user", f"Write a line about the {THINGS[number % len(THINGS)]}, number {number}.")
    before = (Message("user", "Hello!"), Message("assistant", "Hello. What shall I write?")) if number % 5 == 0 else ()
    return Prompt(f"p{number:04d}", (*before, asked), (1 + number % 50, 2, 3))


def save_words(folder: Path, policy_id: str, logits: Floats) -> Policy:
    """A policy in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"logits": logits}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "words"}), encoding="utf-8")
    probe = Probe((1, 2), (float(_log_softmax(logits)[2]),))
    policy = Policy(policy_id, folder, digest_folder(folder), probe=probe)
    write_policy(policy)
    return policy


class Policies:
    """Log-probs of the words under policies on disk, each read once."""

    def __init__(self) -> None:
        self._logits: dict[str, Floats] = {}

    def logits(self, policy: Policy) -> Floats:
        if policy.digest not in self._logits:
            self._logits[policy.digest] = load_file(policy.path / "model.safetensors")["logits"]
        return self._logits[policy.digest]

    def score(self, policy: Policy, tokens: Sequence[int]) -> list[float]:
        logps = _log_softmax(self.logits(policy))
        return [float(logps[token]) for token in tokens]


class WordEngine:
    """`protocols.Engine`."""

    kind = "words"

    def __init__(self) -> None:
        self.policies = Policies()
        self.policy: Policy | None = None

    def load(self, policy: Policy) -> float:
        self.policy = policy
        return 0.0

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        assert self.policy is not None
        logps = _log_softmax(self.policies.logits(self.policy))
        bounds = np.cumsum(np.exp(logps))
        for request in requests:
            yield [_answer(request.prompt, i, s, sampling, logps, bounds) for i, s in enumerate(request.seeds)]

    def score(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        assert self.policy is not None
        return [self.policies.score(self.policy, rest) for _, rest in items]

    def rest(self) -> None:
        """Nothing to leave."""

    def notes(self) -> list[str]:
        return []


class WordLearner:
    """`protocols.Learner`: DPO by its own gradient."""

    def __init__(self) -> None:
        self.policies = Policies()

    def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
        yield TrainStart("engine", 1e-6, 2e-6)
        theta = self.policies.logits(job.policy).copy()
        reference = _log_softmax(self.policies.logits(job.reference))
        order = np.random.default_rng(job.seed).permutation(len(job.pairs))
        batches = [order[at : at + job.dpo.batch_size] for at in range(0, len(order), job.dpo.batch_size)]
        for number, batch in enumerate(batches, 1):
            pairs = [job.pairs[place] for place in batch]
            step, gradient = _dpo(theta, reference, pairs, job.dpo.beta)
            theta -= job.dpo.lr * gradient
            size = float(np.linalg.norm(gradient))
            yield TrainStep(number, len(batches), grad_norm=size, lr=job.dpo.lr, seconds=0.001, **step)
        yield save_words(job.out, job.policy_id, theta)

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        return [self.policies.score(policy, candidate.token_ids) for _, candidate in items]

    def probe(self, policy: Policy, token_ids: Sequence[int]) -> Probe:
        return Probe(tuple(token_ids), tuple(self.policies.score(policy, token_ids[1:])))

    def rest(self) -> None:
        """Nothing to leave."""


def run_words(root: Path, per_round: int, held_out: int, **changes: Any) -> RunStore:
    """A whole run in folder `root`: the experiment of `word_experiment` with some keys changed."""
    spec = word_experiment(root.name, per_round, held_out, **changes)
    prompts = [word_prompt(number) for number in range(2 * per_round + held_out)]
    root.mkdir(parents=True)
    train, kept = tuple(prompts[held_out:]), tuple(prompts[:held_out])
    write_prompts(root / "prompts.parquet", {"train": train, "held_out": kept})
    logits = np.random.default_rng(7).normal(0, 0.5, len(WORDS))
    initial = save_words(root / "initial", "initial", logits)
    manifest = {
        "online_dpo": "0", "python": "3.11", "packages": {"numpy": np.__version__}, "judges": {},
        "model": {"name": "words", "origin": "made", "digest": initial.digest},
        "prompts": {"path": "made", "digest": "0" * 64, "train": len(train), "held_out": held_out},
    }  # fmt: skip
    run = Run(
        store=RunStore.create(root, spec, manifest), experiment=spec, initial=initial, train_prompts=train,
        held_out=kept, engine=WordEngine(), learner=WordLearner(), progress=Spoken(), judge_folders=(HERE,),
    )  # fmt: skip
    assert run_experiment(run) == {}
    return run.store


def word_experiment(name: str, per_round: int, held_out: int, **changes: Any) -> Experiment:
    """Two arms, one seed, two rounds, a training judge that can be exploited and a gold judge that cannot."""
    data = {
        "name": name,
        "model": "words",
        "prompts": {"path": "made", "per_round": per_round, "held_out": held_out},
        "sampling": {"n": 4, "max_tokens": 24},
        "judge": {"use": "word_judges:Cheerful"},
        "evaluation": {"gold": {"use": "word_judges:Plain"}, "off_policy": 16},
        "max_abstain": 0.5,
        "dpo": {"batch_size": 32, "beta": 0.1, "lr": 3.0},
        "rounds": 2,
        "arms": {"on_policy": {}, "self_offline": {"source": "initial"}},
        "audit": {"prompts": 4},
        "judge_timeout": None,
    }
    return validate_experiment(data | changes, "test")


def _answer(prompt: Prompt, index: int, seed: int, sampling: SamplingSpec, logps: Floats, bounds: Floats) -> Candidate:
    drawn = np.random.default_rng(seed).random(sampling.max_tokens)
    tokens = [int(one) for one in np.minimum(np.searchsorted(bounds, drawn), len(WORDS) - 1)]
    ended = 0 in tokens
    tokens = tokens[: tokens.index(0) + 1] if ended else tokens
    text = " ".join(WORDS[token] for token in tokens if token)
    logprobs = tuple(float(logps[token]) for token in tokens)
    return Candidate(prompt.id, index, text, tuple(tokens), logprobs, "stop" if ended else "length", seed)


def _dpo(theta: Floats, reference: Floats, pairs: Sequence[Pair], beta: float) -> tuple[dict[str, Any], Floats]:
    """A step's figures, and the gradient of −log σ(β(r_w − r_l)): ∂r/∂θ of an answer is its counts − its length · p."""
    own = _log_softmax(theta)
    chosen, rejected = (
        np.stack([_counts(answer) for answer in side]) for side in zip(*map(_sides, pairs), strict=True)
    )
    r_w, r_l = chosen @ (own - reference), rejected @ (own - reference)
    margin = beta * (r_w - r_l)
    weight = beta / (1 + np.exp(margin))
    slope = (chosen - rejected) - np.outer(chosen.sum(1) - rejected.sum(1), np.exp(own))
    figures = {
        "loss": float(np.log1p(np.exp(-margin)).mean()), "margin": float(margin.mean()),
        "accuracy": float(((margin > 0) + 0.5 * (margin == 0)).mean()),
        "r_w": float(r_w.mean()), "r_l": float(r_l.mean()), "tokens": int(chosen.sum() + rejected.sum()),
    }  # fmt: skip
    return figures, -(weight[:, None] * slope).mean(axis=0)


def _sides(pair: Pair) -> tuple[Candidate, Candidate]:
    return pair.chosen, pair.rejected


def _counts(answer: Candidate) -> Floats:
    return np.bincount(answer.token_ids, minlength=len(WORDS)).astype(np.float64)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max()
    found: Floats = shifted - np.log(np.exp(shifted).sum())
    return found
