"""Seconds and memory on GPUs that are not there: data sheets' figures times assumed utilisations.

Decoding reads all weights, and keys and values of every sequence, for each token: it is bound by memory bandwidth
until rows are so many that arithmetic is (Pope et al. 2022, "Efficiently Scaling Transformer Inference", section 2).
Training, scoring and prompts are bound by arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from online_dpo.config import Experiment
from online_dpo.errors import ConfigError, nearest
from online_dpo.planner.disk import policy_bytes, trained_parameters
from online_dpo.planner.memory import LearnerMemory
from online_dpo.planner.operations import Text, forward_flops, kv_bytes, text, training_flops
from online_dpo.planner.shape import ModelShape
from online_dpo.planner.work import INITIAL, RoundWork

BANDWIDTH_USED = 0.6
"""Of the data sheet's, while decoding."""
PROMPTS_USED = 0.5
"""Of the peak of arithmetic, in prompts, in scoring and in decoding with many rows."""
TRAINING_USED = 0.35
"""Of the peak of arithmetic, in training, exchange between GPUs included."""
DISK = 2e9
"""Bytes a second, of policies written and read."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """By its data sheet: bytes of memory, bytes a second, dense bfloat16 operations a second; and how many sequences
    vLLM 0.32 runs at once on it (`EngineArgs.get_batch_defaults`)."""

    memory: float
    bandwidth: float
    flops: float
    rows: int


GPUS = {
    "a100": Gpu(80e9, 2.039e12, 312e12, 256),
    "h100": Gpu(80e9, 3.35e12, 989e12, 1024),
    "h200": Gpu(141e9, 4.8e12, 989e12, 1024),
}
"""NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM; operations without sparsity."""
TOKENS_PER_PASS = 16384
"""Default of `learner.tokens_per_pass` on a GPU."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """`count` GPUs of a kind."""

    name: str
    gpu: Gpu
    count: int


def hardware(said: str) -> Hardware:
    """ "h100:8" as `Hardware`. Raises `ConfigError` with the nearest name."""
    name, sign, count = said.partition(":")
    gpu = GPUS.get(name.lower())
    if gpu is None:
        known = ", ".join(GPUS)
        raise ConfigError(f"--hardware {said:.80}: no GPU '{name:.40}'{nearest(name.lower(), GPUS)}; known: {known}")
    if sign and not (count.isascii() and count.isdigit() and 0 < int(count) <= 1_000_000):
        raise ConfigError(f"--hardware {said:.80}: a name and how many is expected, for example {name.lower()}:8")
    return Hardware(name.lower(), gpu, int(count) if sign else 1)


@dataclass(frozen=True)
class PaperSpeeds:
    """The experiment's engines and learner workers on GPUs of one kind: each engine has `tensor_parallel_size` of
    them, each worker one."""

    experiment: Experiment
    shape: ModelShape
    gpu: Gpu

    @property
    def _parts(self) -> int:
        return self.experiment.engine.tensor_parallel_size

    @property
    def _workers(self) -> int:
        return self.experiment.learner.workers

    @property
    def _policy_s(self) -> float:
        """To write or read a policy once."""
        return policy_bytes(self.experiment, self.shape) / DISK

    def seconds(self, stage: str, work: RoundWork) -> float | None:
        """Of `stage`; None for judging, which nothing here knows."""
        known = {
            "sample": lambda: self.decoding_s(work.prompts, work.n, work.prompt, work.answer, work.longest),
            "pair": lambda: 0.0,
            "train": lambda: self._train_s(work),
            "off_policy": lambda: self._off_policy_s(work),
            "evaluate": lambda: self._evaluate_s(work),
            INITIAL: lambda: self._held_out_s(work),
        }
        return known[stage]() if stage in known else None

    def _off_policy_s(self, work: RoundWork) -> float:
        """Each policy read and its pass over the pairs; the trained one is there still."""
        pairs = text(work.prompt, work.answer, 2) * work.scored
        return work.scorers * self._score_s(pairs) + (work.scorers - 1) * self._policy_s if work.scored else 0.0

    def _evaluate_s(self, work: RoundWork) -> float:
        """The policy into the engines, held-out answers, and their log-probs under the others."""
        replies = text(work.prompt, work.reply, 1) * work.held_out
        return self._policy_s + self._held_out_s(work) + work.readers * (self._policy_s + self._score_s(replies))

    def _held_out_s(self, work: RoundWork) -> float:
        return self.decoding_s(work.held_out, 1, work.prompt, work.reply, work.longest_reply)

    def decoding_s(self, prompts: int, n: int, prompt: float, answer: float, longest: int) -> float:
        """`n` answers to each prompt over all engines.

        Rows run together: all, or vLLM's most, or as many as the cache holds at their longest. A step reads weights and
        the rows' keys and values at half their answers, or computes 2 operations a weight and row, whichever is slower;
        there are as many steps as the longest answer has tokens, or as all answers need.
        """
        if not prompts:
            return 0.0
        gpu, shape, parts = self.gpu, self.shape, self._parts
        mine = -(-prompts // self.experiment.cluster.engines)
        rows = max(1.0, min(mine * n, gpu.rows, self.cache_bytes / (kv_bytes(shape, 2) * (prompt + longest))))
        moved = 2 * shape.parameters + rows * (prompt + answer / 2) * kv_bytes(shape, 2)
        computed = 2 * rows * shape.parameters
        step = max(moved / (gpu.bandwidth * BANDWIDTH_USED), computed / (gpu.flops * PROMPTS_USED)) / parts
        steps = max(float(longest if mine * n > 1 else answer), mine * n * answer / rows)
        before = forward_flops(shape, Text(prompt, prompt * (prompt + 1) / 2, 1)) * mine
        return steps * step + before / (parts * gpu.flops * PROMPTS_USED)

    def _train_s(self, work: RoundWork) -> float:
        """Own reference log-probs where the engine's do not serve, all epochs, and the policy written."""
        spec = self.experiment.learner
        once = text(work.prompt, work.answer, work.unit_answers, packed=spec.layout != "plain") * work.units
        frozen, again = self.experiment.lora is not None, spec.activation_checkpointing
        flops = training_flops(self.shape, once * work.epochs, frozen=frozen, checkpointing=again)
        reference = 0.0 if work.own_reference else self._policy_s + self._score_s(once)
        return reference + flops / (self._workers * self.gpu.flops * TRAINING_USED) + self._policy_s

    def _score_s(self, of: Text) -> float:
        return forward_flops(self.shape, of) / (self._workers * self.gpu.flops * PROMPTS_USED)

    # --- memory, of one GPU ---

    @property
    def cache_bytes(self) -> float:
        """An engine's room for keys and values: what `gpu_memory_utilization` leaves beside bfloat16 weights."""
        room = self._parts * self.gpu.memory * self.experiment.engine.gpu_memory_utilization
        return max(0.0, room - 2 * self.shape.parameters)

    @property
    def learner(self) -> LearnerMemory:
        """Of one worker."""
        spec = self.experiment.learner
        return LearnerMemory(
            self.shape,
            trained_parameters(self.experiment, self.shape),
            shards=self._workers if spec.parallel == "fsdp" else 1,
            tokens=spec.tokens_per_pass or TOKENS_PER_PASS,
            value_bytes=4 if spec.dtype == "float32" else 2,
            checkpointing=spec.activation_checkpointing,
        )

    @property
    def gpus_wanted(self) -> int:
        """By the experiment; an engine that shares its GPU with the learner takes turns with it."""
        engines = self.experiment.cluster.engines * self._parts
        both = max if self.experiment.engine.share_gpu else sum
        return int(both((engines, self._workers))) * self.experiment.cluster.lanes

    def assumptions(self) -> list[str]:
        """What the figures rest on, for the screen."""
        gpu = self.gpu
        return [
            f"a GPU: {gpu.memory / 1e9:.0f} GB, {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.flops / 1e12:.0f} TFLOP/s "
            "(bfloat16, dense), by its data sheet",
            f"assumed: {BANDWIDTH_USED:.0%} of the bandwidth while decoding; of the arithmetic {PROMPTS_USED:.0%} in "
            f"prompts and scoring, {TRAINING_USED:.0%} in training; {DISK / 1e9:.0f} GB/s for policies on disk",
            "not counted: judging, starting, and waiting for each other",
        ]
