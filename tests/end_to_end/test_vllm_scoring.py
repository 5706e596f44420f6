"""Scoring in a real vLLM engine, both ways in which it is done, against transformers' forward of the same model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from online_dpo.config import EngineSpec, SamplingSpec
from online_dpo.errors import EngineError, ModelError
from online_dpo.models import resolve_model
from online_dpo.protocols import SampleRequest
from online_dpo.types import Message, Policy, Prompt

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CONTEXTS = ("The capital of France is", "Answer with one letter, A or B. Which one? Answer:", "Once upon")


@pytest.fixture(scope="module")
def policy() -> Policy:
    pytest.importorskip("vllm")
    try:
        model = resolve_model("smollm2-135m-instruct")
    except ModelError as error:
        pytest.skip(str(error))
    return Policy("initial", model.path, model.digest)


@pytest.fixture(scope="module")
def engine(policy: Policy, monkeypatch_module: pytest.MonkeyPatch) -> Iterator[Any]:
    import ray

    from online_dpo.backends import ray_cluster as cluster
    from online_dpo.backends.vllm_engine import vllm_environment

    monkeypatch_module.setenv("PYTHONPATH", str(ROOT))
    cluster.start_ray()
    spec = EngineSpec(kind="vllm")
    actor = cluster.start_engine_actor(vllm_environment(spec, 2), 0)
    settings = cluster.ModelSettings(policy, "smollm2", None, False)
    cluster.wait(actor.build.remote("vllm", settings, spec, 256), EngineError, "the engine")
    yield cluster.RayEngine(actor, "vllm")
    ray.shutdown()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_next_tokens_and_longer_continuations_agree_with_each_other_and_with_transformers(
    engine: Any, policy: Policy
) -> None:
    """The first token of " A B" must have the log-prob of " A" alone; all are transformers' to rounding."""
    from online_dpo.backends.hf_engine import TransformersEngine
    from online_dpo.models import load_tokenizer

    tokenizer = load_tokenizer(policy.path)
    contexts = [tuple(tokenizer(text)["input_ids"]) for text in CONTEXTS]
    tokens = [tokenizer(text)["input_ids"][0] for text in ("A", "B", " Paris", " a")]
    single = [(context, (token,)) for context in contexts for token in tokens]
    double = [(context, (token, tokens[0])) for context in contexts for token in tokens]
    mixed = [item for pair in zip(single, double, strict=True) for item in pair]
    found = engine.score(mixed)
    assert [len(row) for row in found] == [1, 2] * len(single)
    ours = TransformersEngine(policy, EngineSpec()).score(mixed)
    for row, expected in zip(found, ours, strict=True):
        assert row == pytest.approx(expected, abs=1e-3)
    for one, two in zip(found[::2], found[1::2], strict=True):
        assert one[0] == pytest.approx(two[0], abs=1e-4)


def test_more_next_tokens_than_vllm_takes_at_once(engine: Any, policy: Policy) -> None:
    """200 next tokens of one context: their log-probs do not depend on how many are asked for together."""
    from online_dpo.models import load_tokenizer

    context = tuple(load_tokenizer(policy.path)("Once upon a")["input_ids"])
    many = engine.score([(context, (token,)) for token in range(200)])
    alone = engine.score([(context, (token,)) for token in (3, 77, 150)])
    assert [many[token] for token in (3, 77, 150)] == [pytest.approx(row, abs=1e-4) for row in alone]


def test_more_prompts_than_one_step_takes(engine: Any) -> None:
    """Answers with seeds of their own to 12,000 tokens of prompts: no prompt is computed in two parts (on a CPU vLLM
    cannot turn back the generator of such a request), and an answer does not depend on the others."""
    prompts = [Prompt(f"p{n}", (Message("user", "x"),), tuple(range(100 + n, 300 + n))) for n in range(60)]
    requests = [SampleRequest(prompt, (n, 1000 + n)) for n, prompt in enumerate(prompts)]
    sampling = SamplingSpec(n=2, max_tokens=4)
    together = {group[0].prompt_id: group for group in engine.sample(requests, sampling)}
    assert len(together) == 60
    [alone] = engine.sample(requests[7:8], sampling)
    assert [answer.token_ids for answer in alone] == [answer.token_ids for answer in together["p7"]]
