"""A new run that branches off another: rounds before one are taken over, from that one on it goes its own way.

In the round itself every stage whose inputs are the same is taken over too, by the rule by which two arms share work: a
stage is found by the digest of what it was made from. Its files wait in `forked_from/` of the new run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.config import ArmSettings, Experiment, apply_override, flatten, merge, validate_experiment
from online_dpo.errors import ConfigError, RunFolderError, nearest
from online_dpo.files import digest, link_tree, remove, sync_tree
from online_dpo.rounds import sampled_in, still_needed
from online_dpo.store import RoundFolder, RunStore

SHARED = ("prompts.parquet", "initial.json", "human_pairs.parquet", "sft")
"""What lies beside the arms and belongs to any run from the same beginning."""
FIXED = ("model", "revision", "trust_remote_code", "prompts", "lora", "sft", "evaluation", "seeds")
"""Keys that decide what the rounds taken over were made from, or measured by."""


@dataclass(frozen=True, slots=True)
class Fork:
    """Where a run branches: before round `index` of `arm`, at `seeds`. `experiment` is the new run's."""

    store: RunStore
    arm: str
    seeds: tuple[int, ...]
    index: int
    experiment: Experiment

    @property
    def root(self) -> Path:
        """The new run's folder."""
        return Path(self.experiment.output) / self.experiment.name

    @property
    def changed(self) -> list[str]:
        """The arm's keys that are other than they were, dotted: the new experiment itself is as the old arm."""
        whole = self.experiment.model_dump(mode="json")
        before = flatten({key: whole[key] for key in ArmSettings.model_fields})
        after = flatten(self.experiment.arm(self.arm).model_dump(mode="json"))
        return [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]


def plan_fork(
    store: RunStore, arm: str, index: int, changes: Sequence[str], seed: int | None = None, name: str | None = None
) -> Fork:
    """The fork of `store` before round `index` of `arm` with `changes` ("key=value", of the arm or the run).

    Raises `ConfigError` or `RunFolderError`: no such arm, seed or round, a key that the rounds before hang on, nothing
    changed, a policy that later rounds need and that was not kept, a folder that is there already.
    """
    old = store.experiment
    if arm not in old.arms:
        raise ConfigError(f"no arm '{arm}' in {store.root}{nearest(arm, old.arms)}; arms: {', '.join(old.arms)}")
    if seed is not None and seed not in old.seeds:
        raise ConfigError(f"{store.root} was not run with seed {seed} but {', '.join(map(str, old.seeds))}")
    seeds = tuple(old.seeds) if seed is None else (seed,)
    fork = Fork(store, arm, seeds, index, _experiment(store, arm, seeds, changes, name or f"{old.name}-{arm}-{index}"))
    if not fork.changed:
        raise ConfigError("a fork with nothing changed would be the same run again: --set a key of the arm")
    _check_rounds(fork)
    if fork.root.exists():
        raise RunFolderError(
            f"{fork.root} is there already: go on with 'online-dpo resume {fork.root}', or give --name"
        )
    return fork


def lay_fork(fork: Fork, judges: Mapping[str, str], datasets: Mapping[str, Any]) -> Path:
    """Make the new run's folder, whole or not at all, and return it; files are hard-linked.

    `judges`, `datasets`: what the manifest keeps of the new experiment's.
    """
    aside = fork.root.with_name(f".{fork.root.name}.tmp")
    remove(aside)
    aside.mkdir(parents=True)
    for name in SHARED:
        if (fork.store.root / name).exists():
            link_tree(fork.store.root / name, aside / name)
    for seed in fork.seeds:
        for index in range(fork.index + 1):
            old = fork.store.round(fork.arm, seed, index)
            inside = old.path.relative_to(fork.store.root)
            before = index < fork.index
            _take_round(old, aside / inside if before else aside / "forked_from" / inside, whole=before)
    origin = {
        "run": str(fork.store.root.resolve()),
        "experiment": digest(fork.store.root / "experiment.yaml"),
        "arm": fork.arm,
        "seeds": list(fork.seeds),
        "round": fork.index,
        "changed": fork.changed,
    }
    manifest = {**fork.store.manifest, "judges": dict(judges), "datasets": dict(datasets), "forked_from": origin}
    RunStore.create(aside, fork.experiment, manifest)
    sync_tree(aside)
    aside.rename(fork.root)
    return fork.root


def _take_round(old: RoundFolder, new: Path, *, whole: bool) -> None:
    """`old` again at `new`: all finished stages, held against their records; `whole`: its pins and figures too."""
    for folder in [old, *_parts(old)]:
        for file in sorted((folder.path / "stages").glob("*.json")):
            _take_stage(folder, file.stem, new / folder.path.relative_to(old.path))
    for name in ("round.json", "metrics.json"):
        if whole and (old.path / name).exists():
            link_tree(old.path / name, new / name)


def _take_stage(old: RoundFolder, stage: str, new: Path) -> None:
    record = old.done(stage)
    if record is None:
        raise RunFolderError(f"{old.path}: stage '{stage}' has no record in stages/{stage}.json")
    old.verify(record)
    (new / "stages").mkdir(parents=True, exist_ok=True)
    for output in record.outputs:
        name = f".{output}.pruned" if old.pruned(output) else output
        link_tree(old.path / name, new / name)
    link_tree(old.path / "stages" / f"{stage}.json", new / "stages" / f"{stage}.json")


def _parts(folder: RoundFolder) -> list[RoundFolder]:
    """The folders in a round's that have stages of their own."""
    found = sorted({record.parent.parent for record in folder.path.glob("*/**/stages/*.json")})
    return [RoundFolder(folder.run, path, folder.index) for path in found]


# --- what is asked for ---


def _experiment(store: RunStore, arm: str, seeds: Sequence[int], changes: Sequence[str], name: str) -> Experiment:
    """The old experiment with one arm and the changes, measured as before."""
    old = store.experiment
    change: dict[str, Any] = {}
    for assignment in changes:
        apply_override(change, assignment)
    own = _arm_change(arm, change)
    _check_keys(change)
    data = old.model_dump(mode="json")
    settings = old.arm(arm).model_dump(mode="json")
    # A new judge trains; what was measured before must be measured by the same one from now on.
    data["evaluation"]["judge"] = old.evaluation_judge(arm).model_dump(mode="json")
    settings["source"] = _elsewhere(store, settings["source"])
    data |= {**settings, "arms": {arm: own}, "seeds": list(seeds), "name": name, "output": str(store.root.parent)}
    return validate_experiment(merge(data, change), "fork")


def _arm_change(arm: str, change: dict[str, Any]) -> dict[str, Any]:
    """Takes out of `change` what is the arm's, written as `key` or `arms.ARM.key`."""
    by_arm = change.pop("arms", {})
    other = next((name for name in by_arm if name != arm), None) if isinstance(by_arm, dict) else str(by_arm)
    if other is not None:
        raise ConfigError(f"--set arms.{other}: a fork has the arm '{arm}' alone")
    own = {key: change.pop(key) for key in list(change) if key in ArmSettings.model_fields}
    return merge(own, by_arm.get(arm) or {})


def _check_keys(change: Mapping[str, Any]) -> None:
    for key in change:
        if key in FIXED:
            raise ConfigError(
                f"--set {key}: a fork keeps it, since its first rounds were made with it; start a new run"
            )
        if key == "name":
            raise ConfigError("--set name: a fork's name is given by --name")
        if key not in Experiment.model_fields:
            raise ConfigError(f"--set {key}: unknown key '{key}'{nearest(key, Experiment.model_fields)}")


def _elsewhere(store: RunStore, source: Any) -> Any:
    """A source that streams an arm of the old run: from the new one that is another run."""
    if not isinstance(source, dict):
        return source
    if source.get("stream") and ":" not in source["stream"]:
        return {**source, "stream": f"{store.root.resolve()}:{source['stream']}"}
    if source.get("mixture"):
        parts = [{**part, "source": _elsewhere(store, part["source"])} for part in source["mixture"]]
        return {**source, "mixture": parts}
    return source


def _check_rounds(fork: Fork) -> None:
    """The rounds before are finished, and what the others need of them was kept."""
    rounds = fork.experiment.arm(fork.arm).rounds
    if not 1 <= fork.index <= rounds:
        raise ConfigError(f"--round {fork.index}: the arm has rounds 1 to {rounds}")
    for seed in fork.seeds:
        label = f"{fork.store.root}: {fork.arm} · seed {seed}"
        for index in range(fork.index):
            if not fork.store.round(fork.arm, seed, index).closed:
                raise RunFolderError(f"{label} has not finished round {index}: fork at round {index} at the latest")
        last = fork.store.round(fork.arm, seed, fork.index - 1)
        needed = still_needed(fork.experiment.arm(fork.arm), fork.index - 1, sampled_in(last))
        for kind, wanted in (("policy", needed.policies), ("reference", needed.references)):
            gone = [at for at in sorted(wanted) if at and fork.store.round(fork.arm, seed, at).pruned(kind)]
            if gone:
                raise RunFolderError(
                    f"{label} did not keep the {kind} of round {gone[0]} (keep: {fork.store.experiment.keep})"
                )
