"""An engine whose memory does not suffice halves its batch, once, says so, and gives the same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from online_dpo.backends.hf_engine import TransformersEngine
from online_dpo.backends.memory_need import wants_memory
from online_dpo.config import EngineSpec, SamplingSpec
from online_dpo.errors import EngineError
from online_dpo.protocols import SampleRequest
from online_dpo.types import Candidate, Message, Policy, Prompt

SAMPLING = SamplingSpec(n=2, max_tokens=3)
REQUESTS = [
    SampleRequest(Prompt(f"p{i}", (Message("user", "x"),), tuple(range(3, 7 + i))), (10 * i, 10 * i + 1))
    for i in range(5)
]
ITEMS = [((3, 4, 5), (6, 7)), ((8, 9), (10,)), ((3,), (4, 5, 6)), ((7, 8), (9, 10)), ((11,), (12,))]


def allocator_error() -> RuntimeError:
    """What torch really says when a CPU has not as much."""
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has an exabyte")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "cpu": allocator_error,
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "python": MemoryError,
}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str, Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")


def engine_of(model: Path, most: int | None, error: Callable[[], BaseException] = MemoryError) -> TransformersEngine:
    """An engine of batches of 8, with memory for `most` sequences at once."""
    engine = TransformersEngine(Policy("initial", model, "d"), EngineSpec(kind="transformers", batch_size=8))
    forward = engine.model.forward

    def limited(*arguments: Any, **named: Any) -> Any:
        rows = len(named["input_ids"] if "input_ids" in named else arguments[0])
        if most is not None and rows > most:
            raise error()
        return forward(*arguments, **named)

    engine.model.forward = limited
    return engine


def sampled(engine: TransformersEngine) -> dict[str, list[Candidate]]:
    return {group[0].prompt_id: group for group in engine.sample(REQUESTS, SAMPLING)}


@pytest.mark.parametrize("kind", ERRORS)
def test_half_the_batch_gives_the_same_answers(model: Path, kind: str) -> None:
    enough, little = engine_of(model, None), engine_of(model, 4, ERRORS[kind])
    expected, found = sampled(enough), sampled(little)
    for prompt_id, group in expected.items():
        for one, other in zip(group, found[prompt_id], strict=True):
            assert (one.text, one.token_ids, one.index, one.seed) == (
                other.text,
                other.token_ids,
                other.index,
                other.seed,
            )
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert list(found) == list(expected)
    assert little.batch_size == 4
    [line] = little.notes()
    assert line.startswith("the engine's memory did not suffice for 8 sequences at once: it goes on with 4 (")
    assert "\n" not in line
    assert little.notes() == enough.notes() == []


def test_scores_too(model: Path) -> None:
    little = engine_of(model, 2, allocator_error)
    expected, found = engine_of(model, None).score(ITEMS), little.score(ITEMS)
    assert [len(row) for row in found] == [2, 1, 3, 2, 1]
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert little.batch_size == 2


def test_the_second_time_is_the_engines_error(model: Path) -> None:
    little = engine_of(model, 3)
    with pytest.raises(
        EngineError, match=r"does not suffice for 4 sequences at once \(MemoryError\); set engine.batch"
    ):
        sampled(little)


def test_one_sequence_cannot_be_halved(model: Path) -> None:
    with pytest.raises(EngineError, match="for 1 sequences at once"):
        engine_of(model, 0).score(ITEMS[:1])


def test_another_error_is_none_of_memory(model: Path) -> None:
    broken = engine_of(model, 4, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        sampled(broken)
    assert broken.batch_size == 8
    assert not wants_memory(ValueError("DefaultCPUAllocator"))
