"""The planner's formulas by hand, lines through recorded seconds, and what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from online_dpo.config import Experiment, validate_experiment
from online_dpo.errors import ConfigError, ModelError
from online_dpo.planner.disk import arm_disk, policy_bytes, trained_parameters
from online_dpo.planner.measured import Line, MeasuredSpeeds, fit
from online_dpo.planner.memory import LearnerMemory
from online_dpo.planner.observed import Observed
from online_dpo.planner.operations import Text, forward_flops, kv_bytes, text, training_flops
from online_dpo.planner.paper import PaperSpeeds, hardware
from online_dpo.planner.predicting import on_paper, start_seconds
from online_dpo.planner.prediction import ArmPrediction, Place, Prediction, ProcessNeed
from online_dpo.planner.rehearsal import Rehearsed
from online_dpo.planner.shape import folder_of, shape_of
from online_dpo.planner.work import INITIAL, STAGES, Rates, round_work, stage_units, training_passes

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
BASE = {
    "name": "t",
    "model": "m",
    "prompts": {"path": "p", "per_round": 10, "held_out": 6, "max_tokens": 30},
    "sampling": {"n": 4, "max_tokens": 20},
    "judge": {"use": "judges.length:LengthJudge"},
    "dpo": {"batch_size": 4, "epochs": 2},
    "rounds": 3,
}


def experiment(**changes: Any) -> Experiment:
    return validate_experiment(BASE | changes, "test")


def model(folder: Path, **changes: Any) -> Path:
    """A folder with a config.json alone."""
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in (LLAMA_7B | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# --- a model's shape ---


def test_parameters_of_a_7b_llama_by_its_config_alone(tmp_path: Path) -> None:
    """A layer: 4·4096² of attention, 3·4096·11008 of the MLP, two norms of 4096: 202,383,360. 32 layers and the last
    norm: 6,476,271,616. Embeddings and head: 2·32000·4096 = 262,144,000. Llama 2 7B has 6,738,415,616."""
    shape = shape_of(model(tmp_path))
    assert shape.layer_weights == 6_476_271_616
    assert shape.parameters == 6_738_415_616
    assert (shape.head_size, shape.attention_width, shape.outside) == (128, 4096, 262_144_000)


def test_operations_and_cache_of_a_7b_llama_by_hand(tmp_path: Path) -> None:
    """Packed, a prompt of 2 and two answers of 3: 2 + 3 + 3 tokens; keys seen: 1 + 2 by the prompt, 3 + 4 + 5 by each
    answer: 27; 6 scored. Two bytes a value, a token's keys and values: 2·32·4096·2 = 524,288 bytes."""
    shape = shape_of(model(tmp_path))
    pair = text(2, 3, 2)
    assert pair == Text(8, 27, 6)
    assert text(2, 3, 2, packed=False) == Text(10, 30, 6)
    forward = 2 * 6_476_271_616 * 8 + 4 * 4096 * 32 * 27 + 2 * 4096 * 32000 * 6
    assert forward_flops(shape, pair) == forward
    assert training_flops(shape, pair) == 3 * forward
    assert training_flops(shape, pair, frozen=True, checkpointing=True) == 3 * forward
    assert kv_bytes(shape, 2) == 524_288


def test_a_model_with_grouped_heads_and_tied_embeddings(tmp_path: Path) -> None:
    """Keys and values of 8 heads of 128: 2·4096·1024 in place of 2·4096²; embeddings once."""
    shape = shape_of(model(tmp_path, num_key_value_heads=8, tie_word_embeddings=True))
    assert shape.layer_weights == 6_476_271_616 - 32 * 2 * 4096 * (4096 - 1024)
    assert shape.outside == 32000 * 4096
    assert kv_bytes(shape, 2) == 2 * 32 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"num_hidden_layers": None}, "does not say num_hidden_layers"),
        ({"vocab_size": "many"}, "does not say vocab_size"),
    ],
)
def test_a_config_that_does_not_serve_is_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as error:
        shape_of(model(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_a_model_without_a_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs that one file"):
        folder_of("meta/very-large", [tmp_path])


# --- work ---


def test_work_of_a_round_by_hand() -> None:
    """10 prompts × 4 answers of half of 20 tokens; 80 % of 10 pairs; a pair's tokens: 30 + 2·10. Twice: 2·8·50 = 800
    tokens, in 2·⌈8/4⌉ steps. 3·800 forwards with all weights, 2·800 with an adapter; the reference is the engine's."""
    work = round_work(experiment(), "on_policy", 6, Rates(prompt=30, answer=0.5, held_out=0.25, kept=0.8))
    assert (work.sampled, work.judged, work.audited, work.units, work.steps) == (40, 40, 40, 8, 4)
    assert (work.sampled_tokens, work.trained_tokens) == (40 * 10 + 6 * 5, 800)
    units = stage_units(work, training_passes(lora=False, checkpointing=False))
    expected = {"sample": 400, "judge": 40, "audit": 40, "pair": 40, "train": 2400, "off_policy": 8 * 2 * 50}
    assert units == expected | {"evaluate": 30, INITIAL: 30}
    assert stage_units(work, training_passes(lora=True, checkpointing=False))["train"] == 1600


def test_a_reference_that_did_not_sample_costs_a_forward() -> None:
    """Every pair once more: 8·50 tokens."""
    rates = Rates(prompt=30, answer=0.5, kept=0.8)
    work = round_work(experiment(source="initial"), "on_policy", 6, rates)
    assert stage_units(work, 3)["train"] == 2400 + 400


def test_the_cap_on_pairs_comes_after_ties() -> None:
    """16 prompts, 60 % of which give a pair: 10, of which 8 are kept."""
    spec = experiment(prompts={"path": "p", "per_round": 16, "held_out": 6}, pairing={"max_pairs": 8})
    assert round_work(spec, "on_policy", 6, Rates(prompt=30, kept=0.6)).units == 8
    assert round_work(spec, "on_policy", 6, Rates(prompt=30, kept=0.25)).units == 4


# --- lines ---


def test_a_line_through_two_sizes_has_a_start() -> None:
    """(10, 3) and (40, 9): 0.2 a unit and 1 to start."""
    line = fit([(10, 3.0), (40, 9.0)])
    assert (line.fixed, line.each) == pytest.approx((1.0, 0.2))


def test_what_the_first_round_takes_more_is_of_the_start() -> None:
    """Sampling: 1 + 0.2 · 10 = 3 of the 5 seconds are the stage's. Training took less than later: nothing."""
    points = {"sample": [(10.0, 3.0), (40.0, 9.0)], "train": [(5.0, 2.0), (5.0, 2.0)]}
    first = {"sample": (10.0, 5.0), "train": (5.0, 1.0), "judge": (10.0, 9.0)}
    found = Rehearsed(Observed(points), first, start_s=7.0, peaks={}, batch=1)
    assert start_seconds(found) == pytest.approx(7.0 + 2.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
def test_how_old_a_process_is() -> None:
    """What it has done before it asks counts, and so does the start of Python; the clock ticks in hundredths."""
    code = "import time; from online_dpo.planner.processes import age; time.sleep(0.3); print(age())"
    began = time.monotonic()
    told = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert 0.29 < told < time.monotonic() - began + 0.05


def test_sizes_that_are_nearly_the_same_say_nothing_of_a_start() -> None:
    """1, 0.9 and, from a busy moment, 5 seconds a unit: the median."""
    assert fit([(10, 10.0), (11, 9.9), (12, 60.0)]) == Line(0.0, 1.0)


def test_stages_that_had_nothing_to_do_are_no_points() -> None:
    """Rounds with given answers sample none; 0.004 s for it says nothing of sampling."""
    assert fit([(0, 0.004), (20, 4.0), (0, 0.2)]) == Line(0.0, 0.2)
    assert fit([(0, 0.004)]) == Line(0.0, 0.0)


def test_no_part_of_a_line_is_negative() -> None:
    """The least squares through zero of (1, 1) and (3, 9): (1 + 27)/(1 + 9)."""
    assert fit([(1, 1.0), (3, 9.0)]) == Line(0.0, 2.8)
    assert fit([(1, 4.0), (3, 2.0)]) == Line(3.0, 0.0)


def test_a_stage_without_work_takes_no_time_and_one_that_was_not_measured_is_unknown() -> None:
    work = round_work(experiment(audit={"prompts": 0}), "on_policy", 6, Rates(prompt=30))
    speeds = MeasuredSpeeds({"sample": Line(1.0, 0.01)}, 3)
    assert speeds.seconds("sample", work) == pytest.approx(1 + 0.01 * 40 * 20)
    assert speeds.seconds("audit", work) == 0.0
    assert speeds.seconds("judge", work) is None


# --- on paper ---


def test_decoding_reads_weights_and_cache_until_arithmetic_binds(tmp_path: Path) -> None:
    """One H100, 10 prompts × 4 answers of 20 tokens behind 30: 40 rows at once. A step moves 2·P bytes of weights and
    40·(30 + 10)·524,288 of cache at 0.6·3.35e12 bytes/s; 20 steps. The prompts, once each: their operations at half of
    989e12 a second."""
    shape = shape_of(model(tmp_path))
    speeds = PaperSpeeds(experiment(), shape, hardware("h100").gpu)
    step = (2 * 6_738_415_616 + 40 * 40 * 524_288) / (0.6 * 3.35e12)
    prompts = 10 * forward_flops(shape, Text(30, 465, 1)) / (0.5 * 989e12)
    assert speeds.decoding_s(10, 4, 30, 20, 20) == pytest.approx(20 * step + prompts)


def test_training_on_paper_is_operations_over_what_is_used_of_the_peak(tmp_path: Path) -> None:
    """2 epochs of 10 pairs, 3 forwards each, at 0.35·989e12 on 2 workers; the policy's 4·P bytes at 2 GB/s."""
    shape = shape_of(model(tmp_path))
    spec = experiment(learner={"workers": 2, "parallel": "fsdp"})
    work = round_work(spec, "on_policy", 6, Rates(prompt=30))
    flops = 2 * 10 * 3 * forward_flops(shape, text(30, 20, 2))
    expected = flops / (2 * 0.35 * 989e12) + 4 * shape.parameters / 2e9
    assert PaperSpeeds(spec, shape, hardware("h100:8").gpu).seconds("train", work) == pytest.approx(expected)


def test_memory_of_a_sharded_worker_by_hand(tmp_path: Path) -> None:
    """4 shards: 16·P/4 bytes. Whole at a time: two layers, embeddings and head in float32, one layer's bfloat16 copy.
    Activations with checkpointing: 32 · 4096 values of 1024 tokens at 2 bytes, and one layer's 17 · 4096."""
    shape = shape_of(model(tmp_path))
    need = LearnerMemory(shape, shape.parameters, shards=4, tokens=1024, value_bytes=2, checkpointing=True)
    assert need.states == 4 * 6_738_415_616
    assert need.gathered == 4 * (2 * shape.layer + 262_144_000) + 2 * shape.layer
    assert need.activations == 2 * 1024 * 4096 * (32 + 17)
    adapter = LearnerMemory(shape, 1000, shards=1, tokens=1024, value_bytes=4, checkpointing=False)
    assert adapter.states == 16 * 1000 + 4 * shape.parameters
    assert adapter.gathered == 0


def test_an_adapters_parameters(tmp_path: Path) -> None:
    """Rank 2: 4 matrices of 4096 + 4096, 3 of 4096 + 11008, in 32 layers. On disk in float32."""
    spec = experiment(lora={"rank": 2})
    shape = shape_of(model(tmp_path))
    assert trained_parameters(spec, shape) == 32 * 2 * (4 * 8192 + 3 * 15104)
    assert policy_bytes(spec, shape) == 4 * trained_parameters(spec, shape)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("h10", "did you mean 'h100'"),
        ("mi300:8", "known: a100, h100, h200"),
        ("h100:0", "a name and how many"),
        ("h100:many", "a name and how many"),
        ("h100:", "a name and how many"),
    ],
)
def test_hardware_that_is_not_known_is_one_line(said: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        hardware(said)


def test_hardware_is_a_name_and_a_count() -> None:
    assert (hardware("H100:8").count, hardware("a100").count) == (8, 1)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    """One worker with all of 7B: 16·P = 108 GB of 80. And 9 GPUs of 8. A 70B's weights do not lie in one GPU."""
    lines = on_paper(experiment(), model(tmp_path), hardware("h100:2")).does_not_fit()
    assert len(lines) == 1
    assert lines[0].startswith("memory: the learner worker needs 1")
    workers = {"workers": 8, "parallel": "fsdp", "activation_checkpointing": True}
    many = on_paper(experiment(learner=workers), tmp_path, hardware("h100:8"))
    assert [line[:38] for line in many.does_not_fit()] == ["GPUs: the experiment wants 9 (engine.t"]
    large = on_paper(experiment(), model(tmp_path, num_hidden_layers=320), hardware("h100:2")).does_not_fit()
    assert any("engine.tensor_parallel_size higher" in line for line in large)


# --- disk and totals ---


def test_disk_by_hand() -> None:
    """Policies of 100 bytes and 7 beside each, three rounds: all are kept, or one, with three there at times."""
    every = arm_disk(experiment(), "on_policy", 100, 7)
    assert (every.round, every.kept, every.most) == (107, 321, 321)
    last = arm_disk(experiment(keep="last"), "on_policy", 100, 7)
    assert (last.kept, last.most) == (121, 321)


def test_totals_over_arms_seeds_and_rounds() -> None:
    """Two arms of 3 rounds of 7 seconds, two seeds; the initial policy's 5 seconds once a seed: 2·(5 + 2·3·7) and 10 to
    start. Disk: 2·2·321."""
    spec = experiment()
    work = round_work(spec, "on_policy", 6, Rates(prompt=30))
    stages = dict.fromkeys(STAGES, 1.0) | {INITIAL: 5.0}
    arms = [ArmPrediction(name, 3, stages, work, arm_disk(spec, "on_policy", 100, 7)) for name in "ab"]
    found = Prediction(arms, 2, [ProcessNeed("engine", 2, 60.0)], Place(100.0, 1000.0), [], start_s=10.0)
    assert found.seconds == 10 + 2 * (5 + 2 * 3 * 7)
    assert found.kept_bytes == 2 * 2 * 321
    assert [line.split(":")[0] for line in found.does_not_fit()] == ["memory", "disk"]
