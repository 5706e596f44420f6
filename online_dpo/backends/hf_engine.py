"""transformers as the engine, for machines without vLLM: same interface, same records, slower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from online_dpo.backends.hf_model import load_causal_lm, torch_dtype
from online_dpo.backends.memory_need import wants_memory
from online_dpo.backends.probe import check_probe
from online_dpo.config import EngineSpec, SamplingSpec
from online_dpo.errors import EngineError, one_line
from online_dpo.logps import collate, token_logps
from online_dpo.model_config import end_token_ids
from online_dpo.models import load_tokenizer
from online_dpo.protocols import SampleRequest
from online_dpo.types import Candidate, Policy

T = TypeVar("T")
U = TypeVar("U")


class TransformersEngine:
    """Implements `protocols.Engine` with one batched decoding loop.

    `generate` draws a whole batch from one random state; here every sequence has a generator of its own, so an
    answer depends on its own seed and not on its neighbours.
    """

    kind = "transformers"

    def __init__(self, initial: Policy, spec: EngineSpec, *, trust_remote_code: bool = False) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch_dtype(spec.dtype, self.device)
        self.initial = initial
        self.trust_remote_code = trust_remote_code
        self.batch_size = spec.batch_size
        self._halved = False
        self._notes: list[str] = []
        self.share_gpu = spec.share_gpu
        self.tokenizer: Any = load_tokenizer(initial.path, trust_remote_code)
        self.end_tokens = frozenset(end_token_ids(initial.path))
        self.model: Any = self._read(initial)
        self.loaded = initial.digest
        self.checked: Policy | None = None

    def _read(self, policy: Policy) -> Any:
        base = self.initial if policy.adapter else policy
        model: Any = load_causal_lm(base.path, self.dtype, self.trust_remote_code)
        if policy.adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(policy.path)).merge_and_unload()
        return model.eval().to(self.device)

    def load(self, policy: Policy) -> float:
        """See `protocols.Engine.load`."""
        self.model.to(self.device)
        if policy.digest != self.loaded:
            self.model = self._read(policy)
            self.loaded = policy.digest
        found: list[float] = []
        if policy.probe is not None:
            ids = policy.probe.token_ids
            found = self.score([(ids[:1], ids[1:])])[0]
        gap = check_probe(policy, found, str(self.dtype).removeprefix("torch."), self.checked)
        self.checked = policy
        return gap

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        """See `protocols.Engine.sample`. Prompts of like length are decoded together."""
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt.token_ids), i))
        most = max((len(request.seeds) for request in requests), default=1)
        group = max(1, self.batch_size // most)
        for start in range(0, len(order), group):
            chosen = [requests[i] for i in order[start : start + group]]
            rows = [(request, index) for request in chosen for index in range(len(request.seeds))]
            answers = iter(self._computed(lambda part: self._decode(part, sampling), rows))
            for request in chosen:
                yield [next(answers) for _ in request.seeds]

    @torch.no_grad()
    def score(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """See `protocols.Engine.score`. Items of like length are computed together."""
        order = sorted(range(len(items)), key=lambda i: len(items[i][0]) + len(items[i][1]))
        rows: dict[int, list[float]] = {}
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            scored = self._computed(self._scores, [items[i] for i in places])
            rows.update(zip(places, scored, strict=True))
        return [rows[place] for place in range(len(items))]

    def notes(self) -> list[str]:
        """See `protocols.Engine.notes`."""
        notes, self._notes = self._notes, []
        return notes

    def _computed(self, compute: Callable[[Sequence[T]], list[U]], rows: Sequence[T]) -> list[U]:
        """`compute` of all rows; where memory does not suffice, of half as many at once from then on."""
        found: list[U] = []
        while len(found) < len(rows):
            part = rows[len(found) : len(found) + self.batch_size]
            try:
                found.extend(compute(part))
            except (MemoryError, RuntimeError) as error:
                if not wants_memory(error):
                    raise
                self._halve(len(part), error)
        return found

    def _halve(self, rows: int, error: BaseException) -> None:
        """Once. Raises `EngineError` the second time, and where there is nothing to halve."""
        if self._halved or rows == 1:
            raise EngineError(
                f"the engine's memory does not suffice for {rows} sequences at once ({one_line(error)}); "
                "set engine.batch_size, sampling.max_tokens or the prompts' length lower"
            ) from error
        self._halved = True
        self.batch_size = rows // 2
        self._notes.append(
            f"the engine's memory did not suffice for {rows} sequences at once: it goes on with {self.batch_size} "
            f"({one_line(error, 100)}); engine.batch_size: {self.batch_size} would spare the attempt"
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _scores(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        batch = collate(items)
        flat = iter(token_logps(self.model, batch.to(self.device)).tolist())
        return [[next(flat) for _ in range(length)] for length in batch.lengths]

    @torch.no_grad()
    def _decode(self, rows: Sequence[tuple[SampleRequest, int]], sampling: SamplingSpec) -> list[Candidate]:
        token_ids, mask = left_padded([request.prompt.token_ids for request, _ in rows], self.device)
        generators = [torch.Generator().manual_seed(request.seeds[index]) for request, index in rows]
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        done = [False] * len(rows)
        cache: Any = None
        step_ids = token_ids
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for _ in range(sampling.max_tokens):
            output = self.model(
                input_ids=step_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float().cpu()
            picked = draw(logits, sampling, generators, done)
            scores = (logits.gather(-1, picked.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)).tolist()
            for row, token in enumerate(picked.tolist()):
                if not done[row]:
                    tokens[row].append(token)
                    logprobs[row].append(scores[row])
                    done[row] = token in self.end_tokens
            if all(done):
                break
            step_ids = picked.to(self.device).unsqueeze(-1)
            mask = torch.cat([mask, mask.new_ones((len(rows), 1))], dim=-1)
            positions = positions[:, -1:] + 1
        return [self._candidate(*rows[i], tokens[i], logprobs[i], done[i]) for i in range(len(rows))]

    def _candidate(
        self, request: SampleRequest, index: int, token_ids: list[int], logprobs: list[float], ended: bool
    ) -> Candidate:
        return Candidate(
            prompt_id=request.prompt.id,
            index=index,
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True),
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            finish_reason="stop" if ended else "length",
            seed=request.seeds[index],
        )

    def rest(self) -> None:
        """See `protocols.Engine.rest`."""
        if self.share_gpu and self.device.type == "cuda":
            self.model.to("cpu")
            torch.cuda.empty_cache()


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [rows, longest]; padding on the left, so that all rows continue at the end."""
    width = max(len(prompt) for prompt in prompts)
    token_ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        token_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return token_ids.to(device), mask.to(device)


def draw(logits: Tensor, sampling: SamplingSpec, generators: Sequence[torch.Generator], done: Sequence[bool]) -> Tensor:
    """One token a row from softmax(logits / temperature) cut to the top_p nucleus; the largest at temperature 0.

    logits: [rows, vocabulary]. Returns [rows]. Rows that are done draw nothing from their generator.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p < 1.0:
        ordered, where = probabilities.sort(dim=-1, descending=True)
        # A token stays when the mass before it is below top_p (Holtzman et al. 2020): the first always does.
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.scatter(-1, where, ordered.masked_fill(outside, 0.0))
    picked = logits.argmax(-1)
    for row, generator in enumerate(generators):
        if not done[row]:
            picked[row] = torch.multinomial(probabilities[row], 1, generator=generator).item()
    return picked
