"""A round's driver holds a block of it: what is held does not grow with its answers, and what is written does not
depend on the blocks."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_dpo import answer_blocks, sample_stage, tables
from online_dpo.config import validate_experiment
from online_dpo.judging import VerdictCache
from online_dpo.store import RunStore
from online_dpo.types import Prompt

sys.path.append(str(Path(__file__).resolve().parent / "benchmarks"))

import growth_round

ROWS = growth_round.Rows(1 << 12)
PROMPTS = [ROWS.prompt(number) for number in range(300)]
TIMES = ("seconds", "tokens_per_second")


PARTS = ((sample_stage, "ANSWERS_AT_ONCE"), (answer_blocks, "AT_ONCE"), (tables, "READ"))
"""What decides how much of a round is held."""


def a_round(root: Path, prompts: Sequence[Prompt], **changes: Any) -> growth_round.Done:
    """A round of `prompts`, 8 answers each, in a new run folder; its judge is not audited."""
    spec = {**growth_round.settings(len(prompts)), "audit": {"prompts": 0}, **changes}
    root.mkdir()
    store = RunStore.create(root, validate_experiment(spec, "growth"), {})
    with VerdictCache(root / "verdicts.sqlite") as cache:
        return growth_round.do_round(store, ROWS, tuple(prompts), cache)


def peak_of(root: Path, prompts: Sequence[Prompt]) -> int:
    """The most bytes that a round took at once: of Python's own objects, and of Arrow's."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        a_round(root, prompts)
        return tracemalloc.get_traced_memory()[1] + int(pool.max_memory())
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def test_what_is_held_does_not_grow_with_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is more than 2000 bytes as an object. Of one more, what is held is its share of its prompt's places in
    lists and tables; the prompts themselves are the run's."""
    for module, name in (*PARTS, (tables, "GROUP")):
        monkeypatch.setattr(module, name, 256)
    few, many = PROMPTS[:100], PROMPTS[:300]
    a_round(tmp_path / "first", few)  # what is made once, and kept
    grown = peak_of(tmp_path / "many", many) - peak_of(tmp_path / "few", few)
    assert grown / ((len(many) - len(few)) * growth_round.CANDIDATES) < 200


@settings(max_examples=4, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 300)] * len(PARTS)), max_pairs=st.none() | st.integers(1, 40))
def test_what_is_written_does_not_depend_on_the_blocks(
    sizes: tuple[int, ...], max_pairs: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("blocks")
    pairing = {"pairing": {"rule": "all_pairs", "max_pairs": max_pairs}}
    whole = a_round(root / "whole", PROMPTS[:30], **pairing)
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), size in zip(PARTS, sizes, strict=True):
            patch.setattr(module, name, size)
        cut = a_round(root / "cut", PROMPTS[:30], **pairing)
    for stage, record in whole.records.items():
        assert cut.records[stage].outputs == record.outputs, stage
        kept = {key: value for key, value in record.info.items() if key not in TIMES}
        assert {key: value for key, value in cut.records[stage].info.items() if key not in TIMES} == kept
