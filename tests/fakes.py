"""An engine and a learner without a language model, for the loop's own tests.

Both are pure functions of what they are given (digests, tokens, seeds), so that a run that was interrupted can be held
against one that was not, byte for byte. The learner writes real policy folders. What they were asked to do stands in
`calls`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from online_dpo.config import SamplingSpec
from online_dpo.errors import TrainingError
from online_dpo.models import digest_folder
from online_dpo.policies import write_policy
from online_dpo.protocols import RoundPart, SampleRequest, TrainJob, TrainStart, TrainStep
from online_dpo.types import Candidate, Message, Policy, Probe, Prompt

WORDS = (
    "a",
    "bird",
    "sang",
    "and",
    "the",
    "old",
    "tree",
    "fell",
    "in",
    "Tom's",
    "garden",
    "at",
    "night",
    "é",
    "日",
    "🌳",
)


def digest_of(*parts: object) -> bytes:
    """A SHA-256 over `parts`: the only randomness here."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()


def single(value: float) -> float:
    """The float32 nearest to `value`."""
    result: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return result


def write_weights(folder: Path, *parts: object) -> str:
    """A model folder whose 8 weights follow from `parts`; returns its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}).encode()
    drawn = struct.unpack("<8I", digest_of(*parts))
    file = struct.pack("<Q", len(header)) + header + struct.pack("<8f", *(-value / 2**32 for value in drawn))
    (folder / "model.safetensors").write_bytes(file)
    (folder / "config.json").write_text('{"model_type": "fake"}', encoding="utf-8")
    return digest_folder(folder)


def fake_policy(folder: Path, policy_id: str, *parts: object) -> Policy:
    """A policy in `folder`, its `policy.json` written."""
    digest = write_weights(folder, *parts)
    policy = Policy(policy_id, folder, digest, probe=Probe((1, 2), logprobs_of(digest, (2,))))
    write_policy(policy)
    return policy


def fake_prompt(prompt_id: str) -> Prompt:
    """A prompt whose tokens follow from its id."""
    tokens = tuple(digest_of(prompt_id)[:4])
    return Prompt(prompt_id, (Message("user", f"Tell of {prompt_id}."),), tokens)


def logprobs_of(policy_digest: str, tokens: Sequence[int]) -> tuple[float, ...]:
    """Log-probs in [−4, 0), float32, of `tokens` under a policy."""
    return tuple(
        single(-4 * (digest_of(policy_digest, place, token)[0] + 1) / 256) for place, token in enumerate(tokens)
    )


class FakeEngine:
    """`protocols.Engine`: an answer follows from the policy's digest, the prompt and the candidate's seed."""

    kind = "fake"

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls
        self.policy: Policy | None = None

    def load(self, policy: Policy) -> float:
        self.calls.append(("load", policy.digest))
        self.policy = policy
        return 0.0

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        self.calls.append(("sample", [(r.prompt.id, r.seeds) for r in requests]))
        for request in reversed(requests):  # any order of prompts is allowed
            yield [self.candidate(request.prompt, i, seed) for i, seed in enumerate(request.seeds)]

    def candidate(self, prompt: Prompt, index: int, seed: int) -> Candidate:
        assert self.policy is not None
        drawn = digest_of(self.policy.digest, prompt.id, seed)
        tokens = tuple(value % len(WORDS) for value in drawn[1 : 2 + drawn[0] % 8])
        text = " ".join(WORDS[token] for token in tokens)
        logprobs = logprobs_of(self.policy.digest, tokens)
        return Candidate(prompt.id, index, text, tokens, logprobs, "stop" if drawn[0] % 2 else "length", seed)

    def score(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        assert self.policy is not None
        self.calls.append(("engine score", len(items)))
        return [list(logprobs_of(self.policy.digest, (*context[-2:], *rest))[-len(rest) :]) for context, rest in items]

    def rest(self) -> None:
        self.calls.append(("engine rest",))

    def notes(self) -> list[str]:
        return []


class FakeLearner:
    """`protocols.Learner`: the new weights follow from everything that training is given."""

    def __init__(self, calls: list[tuple[Any, ...]], stop: Callable[[str], bool] = lambda policy_id: False) -> None:
        self.calls = calls
        self.stop = stop
        """Policies (by id) whose training meets a non-finite loss."""
        self.parts: list[tuple[int, int, int, str]] = []
        """Of every job: steps made before in its round, its own, the schedule's, and what the optimiser had done."""

    def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
        policy, reference, source, pairs, dpo = job.policy, job.reference, job.source, job.pairs, job.dpo
        policy_id, out, seed = job.policy_id, job.out, job.seed
        drawn = source and source.digest
        self.calls.append(("train", policy_id, policy.digest, reference.digest, drawn, list(pairs or job.groups), seed))
        yield TrainStart("engine" if job.drawn_from_reference else "learner", 1e-6, 2e-6)
        steps = -(-len(pairs or job.groups or job.answers) // dpo.batch_size)
        part = job.part or RoundPart(0, steps, steps)
        before = "" if part.begin is None else (part.begin / "state").read_text(encoding="utf-8")
        self.parts.append((part.first, part.steps, part.total, before))
        for number in range(part.first + 1, part.first + part.steps + 1):
            if self.stop(policy_id) and number == part.first + part.steps:
                raise TrainingError("loss nan")
            yield TrainStep(
                step=number, steps=part.total, loss=0.7 - 0.1 * number, margin=0.1 * number, accuracy=0.5,
                grad_norm=number, lr=dpo.lr, r_w=-0.1 * number, r_l=-0.2 * number, tokens=10 * number, seconds=0.5,
            )  # fmt: skip
        tokens = [(pair.prompt.id, pair.chosen.token_ids, pair.rejected.token_ids) for pair in pairs]
        work = [tokens, job.groups, job.rloo, job.answers] if job.groups or job.answers else tokens
        # Its digest must not depend on the name: two arms with the same inputs train the same policy.
        given = [policy.digest, reference.digest, drawn, work, dpo, seed, *([before] if before else [])]
        if part.end is not None:
            part.end.mkdir()
            (part.end / "state").write_text(f"{before}{policy_id[-9:]}: {part.steps} ", encoding="utf-8")
        yield fake_policy(out, policy_id, *given)

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        self.calls.append(("score", policy.digest, [candidate.prompt_id for _, candidate in items]))
        return [list(logprobs_of(policy.digest, candidate.token_ids)) for _, candidate in items]

    def probe(self, policy: Policy, token_ids: Sequence[int]) -> Probe:
        return Probe(tuple(token_ids), logprobs_of(policy.digest, token_ids[1:]))

    def rest(self) -> None:
        self.calls.append(("learner rest",))


class Spoken:
    """`protocols.Progress` that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stages: list[tuple[str, int]] = []
        self.done = 0
        self.others: list[Spoken] = []
        """What was told beside it."""

    def start(self, label: str, total: int, unit: str) -> None:
        self.stages.append((label, total))
        self.done = 0

    def advance(self, amount: int, note: str = "") -> None:
        self.done += amount

    def finish(self) -> None:
        assert self.done == self.stages[-1][1], f"{self.stages[-1]} ended at {self.done}"

    def say(self, line: str) -> None:
        self.lines.append(line)

    def beside(self) -> Spoken:
        other = Spoken()
        other.lines = self.lines
        self.others.append(other)
        return other
