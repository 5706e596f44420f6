"""Two workers that share out a model do what one worker does with all of it; real processes, really joined."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from online_dpo.backends import ray_cluster as cluster
from online_dpo.backends.averaging import average_policies
from online_dpo.backends.hf_model import load_causal_lm
from online_dpo.backends.learner import LocalLearner, batch_order
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.backends.reference_logps import items_of
from online_dpo.config import DPOSpec, LearnerSpec, LoraSpec, RlooSpec, validate_experiment
from online_dpo.errors import ConfigError, EngineError, LearnerError, TrainingError
from online_dpo.models import digest_folder
from online_dpo.passes import deal, fill, tokens_of
from online_dpo.policies import read_policy
from online_dpo.protocols import TrainJob, TrainStart, TrainStep
from online_dpo.types import Group, Pair, Policy

ROOT = Path(__file__).resolve().parents[1]
LORA = LoraSpec(rank=3, alpha=8.0)
"""Three rows of every A, for two workers."""
DPO = DPOSpec(lr=1e-3, batch_size=3, epochs=2, warmup=0.25)
BUDGET = 40
"""Tokens of a pass: a pair or two."""
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": LORA},
    "full-checkpointed": {"activation_checkpointing": True},
    "lora-checkpointed": {"lora": LORA, "activation_checkpointing": True},
    "plain": {"layout": "plain"},
}
Moved = Callable[..., Policy]


@pytest.fixture(scope="module")
def workers(initial: Policy) -> Iterator[list[Any]]:
    """Two workers of a group with shares of `initial`. Actors import the project from this checkout; what is defined
    here is sent to them whole."""
    with pytest.MonkeyPatch.context() as patch:
        before = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *([before] if before else [])]))
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        cluster.start_ray()
        yield started(initial, LearnerSpec(workers=2, parallel="fsdp", threads=1, tokens_per_pass=BUDGET))
        ray.shutdown()


def started(initial: Policy, spec: LearnerSpec) -> list[Any]:
    assert initial.probe is not None
    actors = cluster.start_learner_actors(spec, 0)
    address = cluster.wait(actors[0].address.remote(), EngineError, "learner worker 0")
    settings = cluster.ModelSettings(initial, "small", None, False)
    building = [
        actor.build.remote(rank, 2, address, settings, spec, list(initial.probe.token_ids), False)
        for rank, actor in enumerate(actors)
    ]
    cluster.wait(building, EngineError, "a learner worker")
    assert at_each(actors, lambda actor: actor.learner.model.sharded) == [True, True]
    return actors


def rebuilt(actor: Any, initial: Policy, settings: dict[str, Any], save_every: int | None) -> str:
    """In the worker: another learner in the place of the one that it has."""
    assert initial.probe is not None
    model = PolicyModel(initial, model_name="small", parallel="fsdp", **{"tokens_per_pass": BUDGET, **settings})
    actor.learner = LocalLearner(model, initial.probe.token_ids, save_every=save_every)
    return model.forward.why


def at_each(workers: Sequence[Any], function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(actor, *args)` in every worker at once."""
    found: list[Any] = ray.get([worker.__ray_call__.remote(function, *args) for worker in workers])
    return found


def alone(initial: Policy, save_every: int | None = None, **settings: Any) -> LocalLearner:
    """The learner of one worker, in this process."""
    assert initial.probe is not None
    model = PolicyModel(initial, model_name="small", **{"tokens_per_pass": BUDGET, **settings})
    return LocalLearner(model, initial.probe.token_ids, save_every=save_every)


def job_of(initial: Policy, pairs: Sequence[Pair], out: Path, **changes: Any) -> TrainJob:
    job = TrainJob(
        policy=initial,
        reference=initial,
        source=initial,
        pairs=tuple(pairs),
        dpo=DPO,
        policy_id="next",
        out=out,
        seed=3,
    )
    return replace(job, **changes)


def both(workers: list[Any], one: LocalLearner, job: TrainJob) -> tuple[list[Any], list[Any], Sequence[Tensor]]:
    """What one worker and two say of `job`, and the weights that it starts from."""
    one.model.load(job.policy, job.seed)
    before = [p.detach().clone() for p in one.model.trainable]
    expected = list(one.train(replace(job, out=job.out / "one")))
    found = list(cluster.RayLearner(workers).train(replace(job, out=job.out / "two")))
    return expected, found, before


def same_round(
    expected: list[Any], found: list[Any], one: LocalLearner, before: Sequence[Tensor], rel: float = 1e-5
) -> None:
    """Every figure to rounding (`rel` of losses and norms), and the ends apart by less than 0.2 % of the way gone."""
    assert [type(item) for item in found] == [type(item) for item in expected]
    assert found[0].reference_from == expected[0].reference_from
    for step, other in zip(found[1:-1], expected[1:-1], strict=True):
        assert step.loss == pytest.approx(other.loss, rel=rel)
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=rel)
        assert step.margin == pytest.approx(other.margin, abs=1e-4)
        assert (step.r_w, step.r_l) == pytest.approx((other.r_w, other.r_l), abs=1e-3)
        assert (step.step, step.steps, step.lr) == (other.step, other.steps, other.lr)
    ours = [p.detach().clone() for p in one.model.trainable]
    one.model.load(found[-1])
    theirs = [p.detach().clone() for p in one.model.trainable]
    went = distance(ours, before)
    assert went > 0.05
    assert distance(ours, theirs) / went < 2e-3


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(first, second, strict=True)))


def sides(pairs: Sequence[Pair]) -> list[Any]:
    return [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]


# --- a round ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_round_of_two_is_the_round_of_one(
    workers: list[Any], initial: Policy, pairs: list[Pair], tmp_path: Path, kind: str
) -> None:
    """Five pairs in batches of three and two, twice. What is saved is read back verified, and by plain transformers."""
    at_each(workers, rebuilt, initial, KINDS[kind], None)
    one = alone(initial, **KINDS[kind])
    expected, found, before = both(workers, one, job_of(initial, pairs[:5], tmp_path))
    same_round(expected, found, one, before)
    policy = found[-1]
    assert read_policy(tmp_path / "two") == policy
    assert policy.digest == digest_folder(tmp_path / "two")
    assert sorted(f.name for f in (tmp_path / "two").iterdir()) == sorted(f.name for f in (tmp_path / "one").iterdir())
    for file in sorted((tmp_path / "one").glob("*.json")):
        if file.name != "policy.json":
            assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()
    assert policy.probe.logprobs == pytest.approx(expected[-1].probe.logprobs, abs=1e-3)
    if "lora" not in KINDS[kind]:
        model: Any = load_causal_lm(tmp_path / "two", torch.float32)
        ids = torch.tensor([policy.probe.token_ids])
        rows = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        plain = rows.gather(-1, ids[0, 1:, None]).squeeze(-1).tolist()
        assert policy.probe.logprobs == pytest.approx(plain, abs=1e-4)


def test_two_workers_have_unequal_passes(pairs: list[Pair]) -> None:
    """What the rounds above are about: in their first batch the workers' passes differ in number."""
    units = [items_of([pair]) for pair in pairs[:5]]
    numbers = set()
    for batch in batch_order(5, DPO, seed=3):
        hands = deal([tokens_of(units[i]) for i in batch], 2)
        numbers.add(tuple(len(fill([units[batch[i]] for i in hand], BUDGET)) for hand in hands))
    assert any(first != second for first, second in numbers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_round_of_groups_and_of_answers(
    workers: list[Any], initial: Policy, pairs: list[Pair], moved: Moved, tmp_path: Path, kind: str
) -> None:
    """Five prompts with their judged answers against another reference, then the loss of chosen answers alone."""
    at_each(workers, rebuilt, initial, KINDS[kind], None)
    groups = tuple(
        Group(pair.prompt, (pair.chosen, pair.rejected), (0.5 * number, 1.0)) for number, pair in enumerate(pairs[:5])
    )
    reference = moved(lora=KINDS[kind].get("lora"))
    jobs = {
        "groups": job_of(initial, (), tmp_path / "g", groups=groups, rloo=RlooSpec(), reference=reference),
        "chosen": job_of(initial, pairs[:5], tmp_path / "c", dpo=DPO.model_copy(update={"loss": "sft"})),
    }
    for name, job in jobs.items():
        one = alone(initial, **KINDS[kind])
        expected, found, before = both(workers, one, job)
        assert found[0].reference_from == ("learner" if name == "groups" else "none")
        # A loss of RLOO is a difference of sums of log-probs, each hundreds of times as large.
        same_round(expected, found, one, before, rel=1e-3 if name == "groups" else 1e-5)
        for step, other in zip(found[1:-1], expected[1:-1], strict=True):
            assert (step.reward, step.margin is None) == (other.reward, True)
            assert step.kl == pytest.approx(other.kl, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_one_pair_for_two_workers(
    workers: list[Any], initial: Policy, pairs: list[Pair], moved: Moved, tmp_path: Path, loss: str
) -> None:
    """The second has no pair and makes its passes for nothing; the reference's log-probs are computed, also ranked."""
    at_each(workers, rebuilt, initial, {}, None)
    one = alone(initial)
    dpo = DPO.model_copy(update={"loss": loss})
    job = job_of(initial, pairs[:1], tmp_path, reference=moved(), dpo=dpo)
    expected, found, before = both(workers, one, job)
    assert found[0].reference_from == "learner"
    same_round(expected, found, one, before)


@pytest.mark.slow
def test_model_whose_layers_have_no_names_is_one_unit(
    workers: list[Any], initial: Policy, pairs: list[Pair], tmp_path: Path
) -> None:
    """Nothing but the model's own output tells such a unit of the way back."""
    assert at_each(workers, rebuilt_as_one_unit, initial) == [1, 1]
    one = alone(initial)
    expected, found, before = both(workers, one, job_of(initial, pairs, tmp_path))
    same_round(expected, found, one, before)


def rebuilt_as_one_unit(actor: Any, initial: Policy) -> int:
    from torch.distributed.fsdp import FSDPModule

    from online_dpo.backends import sharding

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "layers", lambda _: [])
        rebuilt(actor, initial, {}, None)
    return sum(isinstance(module, FSDPModule) for module in actor.learner.model.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "gpt_oss"])
def test_architectures(
    workers: list[Any],
    tiny_model: Callable[[str, Path], Path],
    pairs: list[Pair],
    tmp_path: Path,
    architecture: str,
) -> None:
    """Tied and untied heads, capped logits, transposed layers, and one that cannot be packed (its trial fails midway
    through a forward); 259 rows of embeddings for two workers."""
    folder = tiny_model(architecture, tmp_path / "model")
    bare = Policy("initial", folder, digest_folder(folder))
    ids = tuple(range(3, 20))
    policy = replace(bare, probe=PolicyModel(bare, model_name="tiny").probe(ids))
    few = [
        replace(
            pair,
            prompt=replace(pair.prompt, token_ids=tuple(t % 256 + 3 for t in pair.prompt.token_ids)),
            chosen=replace(pair.chosen, token_ids=tuple(t % 256 + 3 for t in pair.chosen.token_ids)),
            rejected=replace(pair.rejected, token_ids=tuple(t % 256 + 3 for t in pair.rejected.token_ids)),
        )
        for pair in pairs[:3]
    ]
    why = at_each(workers, rebuilt, policy, {}, None)
    one = alone(policy)
    assert why == [one.model.forward.why] * 2
    assert ("computed again" in why[0]) == (architecture == "gpt_oss")
    expected, found, before = both(workers, one, job_of(policy, few, tmp_path))
    same_round(expected, found, one, before)
    [again] = at_each(workers[:1], lambda actor: actor.learner.model.forward.packed)
    assert again == (architecture != "gpt_oss")


@pytest.mark.slow
def test_bfloat16_forward_is_that_of_one(workers: list[Any], initial: Policy, pairs: list[Pair]) -> None:
    """Weights are gathered in float32 and narrowed where one worker narrows them: the same bits."""
    at_each(workers, rebuilt, initial, {"dtype": "bfloat16", "tokens_per_pass": 1}, None)
    one = alone(initial, dtype="bfloat16", tokens_per_pass=1)
    asked = sides(pairs)
    assert cluster.RayLearner(workers).score(initial, asked) == one.score(initial, asked)


# --- policies in and out ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_any_policy_is_loaded_scored_and_saved_as_by_one(
    workers: list[Any], initial: Policy, pairs: list[Pair], moved: Moved, tmp_path: Path, kind: str
) -> None:
    """There and back between two policies; saved, equal weights have the digest that one worker gives them."""
    lora = KINDS[kind].get("lora")
    at_each(workers, rebuilt, initial, KINDS[kind], None)
    learner, one = cluster.RayLearner(workers), alone(initial, lora=lora)
    policy, asked = moved(lora=lora), sides(pairs)[:5]
    assert policy.probe is not None and initial.probe is not None
    for held in (policy, initial, policy):
        for ours, theirs in zip(learner.score(held, asked), one.score(held, asked), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
        probe = learner.probe(held, initial.probe.token_ids)
        assert list(probe.logprobs) == pytest.approx(one.probe(held, initial.probe.token_ids).logprobs, abs=1e-5)
    at_each(workers, saved_again, policy, tmp_path / "two")
    assert digest_folder(tmp_path / "two") == policy.digest


def saved_again(actor: Any, policy: Policy, out: Path) -> None:
    actor.learner.model.load(policy)
    actor.learner.model.save("again", out, (1, 5, 6))


@pytest.mark.slow
def test_fresh_adapter_is_the_one_that_its_seed_draws(
    workers: list[Any], initial: Policy, moved: Moved, tmp_path: Path
) -> None:
    """After another adapter was there, which must be gone."""
    at_each(workers, rebuilt, initial, {"lora": LORA}, None)
    at_each(workers, saved_fresh, moved(lora=LORA), initial, tmp_path / "two")
    model = alone(initial, lora=LORA).model
    assert initial.probe is not None
    model.load(initial, 11)
    assert model.save("fresh", tmp_path / "one", initial.probe.token_ids).digest == digest_folder(tmp_path / "two")


def saved_fresh(actor: Any, other: Policy, initial: Policy, out: Path) -> None:
    actor.learner.model.load(other)
    actor.learner.model.load(initial, 11)
    actor.learner.model.save("fresh", out, (1, 5, 6))


@pytest.mark.slow
def test_averaged_adapter_as_reference(
    workers: list[Any], initial: Policy, pairs: list[Pair], moved: Moved, tmp_path: Path
) -> None:
    """Of twice the rank: whole at every worker beside the shares, and gone before the training."""
    at_each(workers, rebuilt, initial, {"lora": LORA}, None)
    one = alone(initial, lora=LORA)
    first, second = moved(1, lora=LORA), moved(2, lora=LORA)
    reference = average_policies(first, second, 0.25, policy_id="average", out=tmp_path / "average")
    job = job_of(initial, pairs, tmp_path, policy=first, reference=reference)
    expected, found, before = both(workers, one, job)
    assert found[0].reference_from == "learner"
    same_round(expected, found, one, before)


@pytest.mark.slow
def test_weights_under_other_names_are_loaded_whole(
    workers: list[Any], initial: Policy, pairs: list[Pair], moved: Moved, tmp_path: Path
) -> None:
    """Some published checkpoints leave the outermost prefix away: transformers knows what to do, and is asked."""
    from safetensors.torch import load_file, save_file

    policy = moved()
    weights = load_file(policy.path / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in weights.items()},
        policy.path / "model.safetensors",
        {"format": "pt"},
    )
    strange = replace(policy, digest="another")
    at_each(workers, rebuilt, initial, {}, None)
    found = cluster.RayLearner(workers).score(strange, sides(pairs)[:2])
    for ours, theirs in zip(found, alone(initial).score(strange, sides(pairs)[:2]), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


# --- what a worker holds ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_each_worker_holds_half(
    workers: list[Any], initial: Policy, pairs: list[Pair], tmp_path: Path, kind: str
) -> None:
    """Bytes of weights and of Adam's moments, after a round, against one worker's; odd numbers of rows round up."""
    at_each(workers, rebuilt, initial, KINDS[kind], None)
    one = alone(initial, **KINDS[kind])
    whole = sum(p.nbytes for p in one.model.model.parameters())
    moments = 2 * sum(p.nbytes for p in one.model.trainable)
    held = at_each(workers, held_bytes, job_of(initial, pairs, tmp_path / "two"))
    for weights, of_adam in held:
        assert 0.45 < weights / whole < 0.55
        assert 0.4 < of_adam / moments < (0.6 if kind == "full" else 0.7)
    assert sum(weights for weights, _ in held) == whole
    assert sum(of_adam for _, of_adam in held) == moments


def held_bytes(actor: Any, job: TrainJob) -> tuple[int, int]:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    used: list[torch.optim.Optimizer] = []
    hook = register_optimizer_step_post_hook(lambda optimiser, *_: used.append(optimiser))
    list(actor.learner.train(job))
    hook.remove()

    def local(tensor: Any) -> int:
        share = tensor.to_local()
        # A view of the whole would be no share: a row of padding is the most that may hang on it.
        assert share.untyped_storage().nbytes() <= share.nbytes + tensor[:1].numel() * 4
        return int(share.nbytes)

    weights = sum(local(p) for p in actor.learner.model.model.parameters())
    states = used[0].state.values()
    return weights, sum(local(state[name]) for state in states for name in ("exp_avg", "exp_avg_sq"))


# --- checkpoints within a round ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_killed_round_goes_on_as_if_nothing_had_been(
    workers: list[Any], initial: Policy, pairs: list[Pair], tmp_path: Path, kind: str
) -> None:
    """Left after three of four steps, the checkpoint is that of the second; taken up again: the same steps and the
    same bits. One worker can go on from it too."""
    job = job_of(initial, pairs, tmp_path / "straight", checkpoint=tmp_path / "kept")
    at_each(workers, rebuilt, initial, KINDS[kind], None)
    straight: list[Any] = list(cluster.RayLearner(workers).train(job))
    at_each(workers, rebuilt, initial, KINDS[kind], 2)
    at_each(workers, steps_of, replace(job, out=tmp_path / "left"), 4)
    assert (tmp_path / "kept" / "state.json").is_file()
    one = alone(initial, save_every=2, **KINDS[kind])
    one.model.load(initial, 3)
    before = [p.detach().clone() for p in one.model.trainable]
    shutil.copytree(tmp_path / "kept", tmp_path / "copied")
    by_one = list(one.train(replace(job, out=tmp_path / "one", checkpoint=tmp_path / "copied")))
    same_round(by_one, straight, one, before)

    at_each(workers, rebuilt, initial, KINDS[kind], 2)
    resumed: list[Any] = list(cluster.RayLearner(workers).train(replace(job, out=tmp_path / "resumed")))
    assert [type(item) for item in resumed] == [TrainStart, *[TrainStep] * 4, Policy]
    assert resumed[-1].digest == straight[-1].digest


def steps_of(actor: Any, job: TrainJob, number: int) -> None:
    """The first `number` things that a round says, and no more."""
    stream = actor.learner.train(job)
    for _ in range(number):
        next(stream)


# --- refusals and failures ---


def test_share_gpu_is_refused_in_one_line() -> None:
    """Several workers with shares; with one, or with whole models, it may be."""
    base: dict[str, Any] = {
        "name": "x",
        "model": "m",
        "prompts": {"path": "prompts.jsonl"},
        "judge": {"use": "judges.heuristics:Length"},
        "engine": {"share_gpu": True},
    }
    with pytest.raises(ConfigError, match=r"engine\.share_gpu: .*, or set learner\.parallel: ddp$") as caught:
        validate_experiment({**base, "learner": {"workers": 2, "parallel": "fsdp"}}, "here")
    assert "\n" not in str(caught.value)
    validate_experiment({**base, "learner": {"workers": 2}}, "here")
    validate_experiment({**base, "learner": {"parallel": "fsdp"}}, "here")


def test_one_worker_has_nobody_to_share_with(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """fsdp with one worker is the same bits as ddp."""
    found = [
        list(alone(initial, parallel=parallel).train(job_of(initial, pairs, tmp_path / parallel)))[-1]
        for parallel in ("ddp", "fsdp")
    ]
    assert [type(policy) for policy in found] == [Policy, Policy]
    assert len({digest_folder(tmp_path / parallel) for parallel in ("ddp", "fsdp")}) == 1


@pytest.mark.slow
def test_shares_do_not_leave_the_gpu(workers: list[Any], initial: Policy) -> None:
    """The experiment is refused; so is a learner that is asked for it all the same."""
    at_each(workers, rebuilt, initial, {}, None)
    with pytest.raises(ConfigError, match=r"engine\.share_gpu must be false"):
        cluster.wait([worker.__ray_call__.remote(rested) for worker in workers], EngineError, "a learner worker")


def rested(actor: Any) -> None:
    actor.learner.model.rest()


@pytest.mark.slow
def test_training_works_after_a_round_that_failed(
    workers: list[Any], initial: Policy, pairs: list[Pair], tmp_path: Path
) -> None:
    """A loss that is not finite on both: a TrainingError, no policy, and the next round is a fresh learner's."""
    at_each(workers, rebuilt, initial, {}, None)
    wild = DPO.model_copy(update={"lr": 1e20, "warmup": 0.0, "clip": 1e9})
    with pytest.raises(TrainingError, match="the last good policy is kept"):
        list(cluster.RayLearner(workers).train(job_of(initial, pairs, tmp_path / "bad", dpo=wild)))
    assert not (tmp_path / "bad").exists()
    one = alone(initial)
    same_round(*(both(workers, one, job_of(initial, pairs, tmp_path))[:2]), one, weights_of(initial))


def weights_of(initial: Policy) -> list[Tensor]:
    model = PolicyModel(initial, model_name="small")
    return [p.detach().clone() for p in model.trainable]


@pytest.mark.slow
def test_a_killed_worker_ends_the_round_in_one_line(
    workers: list[Any], initial: Policy, pairs: list[Pair], tmp_path: Path
) -> None:
    """The second of two, between two of many steps: no policy, one line, and no endless wait. The file's last test:
    the group is of no more use."""
    at_each(workers, rebuilt, initial, {}, None)
    [process] = at_each(workers[1:], lambda _: os.getpid())
    long = DPO.model_copy(update={"epochs": 2000})
    stream = cluster.RayLearner(workers).train(job_of(initial, pairs, tmp_path / "next", dpo=long))
    assert isinstance(next(stream), TrainStart)
    assert isinstance(next(stream), TrainStep)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(LearnerError) as caught:
        list(stream)
    assert str(caught.value).startswith("learner worker ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "next").exists()
