"""A contender of `sampling.py`: vLLM's own `LLM.generate`, one run a turn. Started by `turns.Contender`.

The same environment, options and requests as the product's engine gives; nothing is decoded or streamed.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import turns


def work(options: dict[str, Any]) -> Iterator[turns.Said]:
    """First turn: start. Then one run a turn."""
    from vllm import LLM

    llm = LLM(
        model=options["model"],
        dtype="float32",
        max_model_len=options["length"],
        enforce_eager=True,
        enable_prefix_caching=True,
        generation_config="vllm",
        block_size=32,
        disable_log_stats=True,
        seed=0,
    )
    yield {}
    for run_number in itertools.count():
        requests, params = work_of_a_run(options, run_number)
        began = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        yield {"tokens": tokens, "seconds": time.perf_counter() - began}


def work_of_a_run(options: dict[str, Any], run_number: int) -> tuple[list[Any], list[Any]]:
    """One request a candidate with a seed of its own, as the product's engine makes them."""
    from sampling import seeds_of
    from vllm import SamplingParams

    from online_dpo.model_config import end_token_ids

    prompts = json.loads(Path(options["prompts"]).read_text(encoding="utf-8"))
    end_tokens = list(end_token_ids(Path(options["model"])))
    spec = options["sampling"]
    numbered = [(token_ids, seed) for place, token_ids in enumerate(prompts) for seed in seeds_of(run_number, place)]
    params = [
        SamplingParams(
            temperature=spec["temperature"],
            top_p=spec["top_p"],
            max_tokens=spec["max_tokens"],
            seed=seed,
            logprobs=0,
            detokenize=False,
            stop_token_ids=end_tokens,
        )
        for _, seed in numbered
    ]
    return [{"prompt_token_ids": token_ids} for token_ids, _ in numbered], params


if __name__ == "__main__":
    turns.serve(work(turns.options()))
