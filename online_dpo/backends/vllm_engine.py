"""vLLM as the engine: built once, its weights changed in place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from online_dpo.backends.distributed import be_alone
from online_dpo.backends.hf_model import torch_dtype
from online_dpo.backends.probe import check_probe
from online_dpo.config import EngineSpec, LoraSpec, SamplingSpec
from online_dpo.errors import EngineError
from online_dpo.model_config import end_token_ids
from online_dpo.models import load_tokenizer
from online_dpo.protocols import SampleRequest
from online_dpo.types import Candidate, Policy

NEXT_TOKENS = 64
"""Next tokens of one context that are asked for at once; vLLM 0.32 takes at most 128."""


def vllm_environment(spec: EngineSpec, threads: int) -> dict[str, str]:
    """What the engine's process must have in its environment before vLLM is imported.

    One process for scheduler and worker, since on a small machine each further one costs most of a minute to start;
    several are needed for tensor parallelism alone. The threads are left unbound: vLLM's own binding takes one core.
    """
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(spec.kv_cache_gb))),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


class VllmEngine:
    """Implements `protocols.Engine`. Create it where `vllm_environment` is set."""

    kind = "vllm"

    def __init__(
        self,
        initial: Policy,
        spec: EngineSpec,
        *,
        max_model_len: int,
        lora: LoraSpec | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            raise EngineError("the engine's process lacks vllm_environment()")
        from vllm import LLM

        on_gpu = torch.cuda.is_available()
        self.dtype = torch_dtype(spec.dtype, torch.device("cuda" if on_gpu else "cpu"))
        self.initial = initial
        self.as_adapter = lora is not None and lora.serve == "adapter"
        self.share_gpu = spec.share_gpu and on_gpu
        self.asleep = False
        self.tokenizer: Any = load_tokenizer(initial.path, trust_remote_code)
        self.end_tokens = end_token_ids(initial.path)
        eager = spec.enforce_eager if spec.enforce_eager is not None else not on_gpu
        options: dict[str, Any] = {}
        if on_gpu:
            options |= {"gpu_memory_utilization": spec.gpu_memory_utilization, "enable_sleep_mode": self.share_gpu}
        else:
            # The default block on CPU (128 tokens) is longer than most prompts: nothing would be shared. And a prompt
            # computed in two parts would end vLLM 0.32 where requests have seeds of their own ("CPU Generator does not
            # use offset"): it turns such a request's generator back, which only a GPU's can.
            options |= {"block_size": 32, "enable_chunked_prefill": False}
            if spec.tensor_parallel_size == 1:
                be_alone()  # vLLM's own group of one would listen on all of the machine's addresses
        if self.as_adapter and lora is not None:
            options |= {"enable_lora": True, "max_lora_rank": max(8, lora.rank), "max_loras": 1}
        self.llm = LLM(
            model=str(initial.path),
            dtype=str(self.dtype).removeprefix("torch."),
            max_model_len=max_model_len,
            tensor_parallel_size=spec.tensor_parallel_size,
            enforce_eager=eager,
            enable_prefix_caching=True,
            generation_config="vllm",
            worker_extension_cls="online_dpo.backends.vllm_weights.WeightLoader",
            load_format="safetensors",
            trust_remote_code=trust_remote_code,
            disable_log_stats=True,
            seed=0,
            **options,
        )
        self.loaded = initial.digest
        self.checked: Policy | None = None
        self.merged: str = initial.digest
        self.adapters: dict[str, int] = {}
        self.lora_request: Any = None

    def load(self, policy: Policy) -> float:
        """See `protocols.Engine.load`."""
        self._wake()
        if policy.digest != self.loaded:
            if policy.adapter and self.as_adapter:
                self._take_adapter(policy)
            else:
                self._take_weights(policy)
            # Cached keys and values belong to the old weights.
            if not self.llm.reset_prefix_cache():
                raise EngineError("vLLM could not reset its prefix cache: cached keys belong to the old weights")
            self.loaded = policy.digest
        gap = check_probe(policy, self._score_probe(policy), str(self.dtype).removeprefix("torch."), self.checked)
        self.checked = policy
        return gap

    def _take_weights(self, policy: Policy) -> None:
        self.lora_request = None
        if policy.digest == self.merged:
            return
        base, adapter = (self.initial.path, policy.path) if policy.adapter else (policy.path, None)
        self.llm.collective_rpc("take_policy", args=(str(base), None if adapter is None else str(adapter)))
        self.merged = policy.digest

    def _take_adapter(self, policy: Policy) -> None:
        """vLLM keeps adapters by their number: a number used again would serve the old weights."""
        from vllm.lora.request import LoRARequest

        number = self.adapters.setdefault(policy.digest, len(self.adapters) + 1)
        self.lora_request = LoRARequest(f"policy-{number}", number, str(policy.path))

    def _score_probe(self, policy: Policy) -> list[float]:
        if policy.probe is None:
            return []
        return self.score([(policy.probe.token_ids[:1], policy.probe.token_ids[1:])])[0]

    def score(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """See `protocols.Engine.score`.

        Continuations of one token after the same context are read from one step, which shares cached prefixes; longer
        ones from vLLM's log-probs of a prompt's own tokens, for which it computes the whole prompt.
        """
        rows: dict[int, list[float]] = {}
        single: dict[tuple[int, ...], list[int]] = {}
        for place, (context, continuation) in enumerate(items):
            together = single.setdefault(tuple(context), []) if len(continuation) == 1 else []
            if len(continuation) == 1 and len(together) < NEXT_TOKENS:
                together.append(place)
        for places, found in zip(single.values(), self._next_tokens(single, items), strict=True):
            rows.update((place, [found[items[place][1][0]]]) for place in places)
        longer = [place for place in range(len(items)) if place not in rows]
        rows.update(zip(longer, self._own_tokens([items[place] for place in longer]), strict=True))
        return [rows[place] for place in range(len(items))]

    def _next_tokens(
        self, asked: Mapping[tuple[int, ...], Sequence[int]], items: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[dict[int, float]]:
        """For each context, the log-probs of the next tokens that its items ask for."""
        from vllm import SamplingParams

        if not asked:
            return []
        prompts: list[Any] = [{"prompt_token_ids": list(context)} for context in asked]
        wanted = [sorted({items[place][1][0] for place in places}) for places in asked.values()]
        params = [
            SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=tokens, detokenize=False)
            for tokens in wanted
        ]
        outputs = self.llm.generate(prompts, params, use_tqdm=False, lora_request=self.lora_request)
        entries = [(output.outputs[0].logprobs or [{}])[0] for output in outputs]
        return [
            {token: entry[token].logprob for token in tokens} for tokens, entry in zip(wanted, entries, strict=True)
        ]

    def _own_tokens(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        from vllm import SamplingParams

        if not items:
            return []
        prompts: list[Any] = [{"prompt_token_ids": [*context, *continuation]} for context, continuation in items]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self.llm.generate(prompts, params, use_tqdm=False, lora_request=self.lora_request)
        rows = []
        for (context, continuation), output in zip(items, outputs, strict=True):
            own = (output.prompt_logprobs or [])[len(context) :]
            rows.append([entry[token].logprob for token, entry in zip(continuation, own, strict=True) if entry])
        return rows

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        """See `protocols.Engine.sample`. Candidates are separate requests: each has a seed of its own."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        for number, request in enumerate(requests):
            for index, seed in enumerate(request.seeds):
                params = SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_tokens,
                    seed=seed,
                    logprobs=0,
                    detokenize=False,
                    stop_token_ids=list(self.end_tokens),
                )
                prompt: Any = {"prompt_token_ids": list(request.prompt.token_ids)}
                engine.add_request(f"{number}:{index}", prompt, params, lora_request=self.lora_request)
        waiting: dict[int, list[Candidate]] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not output.finished:
                    continue
                number, index = (int(part) for part in output.request_id.split(":")[:2])
                request = requests[number]
                group = waiting.setdefault(number, [])
                group.append(self._candidate(request, index, output.outputs[0]))
                if len(group) == len(request.seeds):
                    yield sorted(waiting.pop(number), key=lambda candidate: candidate.index)

    def _candidate(self, request: SampleRequest, index: int, output: Any) -> Candidate:
        token_ids = tuple(output.token_ids)
        logprobs = tuple(entry[token].logprob for token, entry in zip(token_ids, output.logprobs, strict=True))
        if output.finish_reason not in ("stop", "length"):
            raise EngineError(f"prompt {request.prompt.id}: vLLM ended with {output.finish_reason!r}")
        return Candidate(
            prompt_id=request.prompt.id,
            index=index,
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True),
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=output.finish_reason,
            seed=request.seeds[index],
        )

    def rest(self) -> None:
        """See `protocols.Engine.rest`: weights go to the host's memory, the cache is given up."""
        if self.share_gpu and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True

    def notes(self) -> list[str]:
        """See `protocols.Engine.notes`; vLLM takes its memory at the start and queues what does not fit."""
        return []

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False
