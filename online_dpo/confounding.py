"""What makes a comparison of arms less than it looks: one plain sentence each, none for a clean experiment."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import combinations

from online_dpo.budget import arm_budget
from online_dpo.config import Experiment, JudgeSpec, flatten
from online_dpo.files import digest_json
from online_dpo.source_spec import SourceSpec, parts_of

ROUNDING = 0.05
"""Budgets that differ by less than this share of the largest are equal but for whole batches and whole prompts."""

SPENT = {"pairs": "pairs", "steps": "steps", "sampled_tokens": "sampled tokens", "judged": "judge calls"}
"""What of an arm's budget is compared, and how it is called."""

ONE_THING = ("algorithm", "rloo", "source", "reference", "judge", "comparing", "pairing")
"""Sections whose keys are one choice together; of all other sections every key is a choice of its own."""
NOT_STUDIED = ("max_abstain",)
"""Keys that decide when a run ends in an error, not what it finds."""
SAME_THING = {"rloo": "algorithm", "comparing": "judge"}
LOSS_KEYS = ("label_smoothing", "simpo_gamma", "discopop_tau", "bco_running_mean", "length_normalize")
"""Keys of `dpo` that say which loss it is: another name of the loss allows or forbids them."""

Digest = Callable[[JudgeSpec], str]
"""What tells one judge from another: `judging.judge_digest`, for instance."""


def by_settings(judge: JudgeSpec) -> str:
    """A judge's digest where its source is not at hand: by its name and settings alone."""
    return digest_json(judge.model_dump(mode="json"))


def confounded(
    experiment: Experiment, digest: Digest = by_settings, own_prompts: Collection[str] | None = None
) -> list[str]:
    """The sentences, the weightiest first.

    `own_prompts`: arms that train on other prompts than the experiment's; None: those whose settings say so.
    """
    return [
        *confounded_settings(experiment, digest, own_prompts),
        *_judges(experiment, digest),
        *_one_seed(experiment),
    ]


def confounded_settings(
    experiment: Experiment, digest: Digest = by_settings, own_prompts: Collection[str] | None = None
) -> list[str]:
    """Those of `confounded` that the settings alone tell: judges and seeds are spoken of by `compare` beside its
    results."""
    return [
        *_faults(experiment),
        *_several_things(experiment),
        *_budgets(experiment),
        *gold_in_training(experiment, digest),
        *_other_prompts(experiment, _rowwise(experiment) if own_prompts is None else own_prompts),
        *_answer_limits(experiment),
        *_no_divergence(experiment),
    ]


def differing_things(experiment: Experiment, one: str, other: str) -> list[str]:
    """What two arms differ in, by dotted key; keys that are one choice together count once."""
    first, second = (flatten(experiment.arm(name).model_dump(mode="json")) for name in (one, other))
    keys = [*first, *(key for key in second if key not in first)]
    return list(
        dict.fromkeys(_thing(key) for key in keys if key not in NOT_STUDIED and first.get(key) != second.get(key))
    )


def gold_in_training(experiment: Experiment, digest: Digest) -> list[str]:
    """A sentence where the gold judge is one that training sees."""
    gold = experiment.evaluation.gold
    if gold is None:
        return []
    seen = [name for name in experiment.arms if digest(experiment.arm(name).judge) == digest(gold)]
    if not seen:
        return []
    return [
        f"evaluation.gold is the judge that {_and(seen)} {'is' if len(seen) == 1 else 'are'} trained on: it cannot "
        "show where training exploits its judge"
    ]


def _thing(key: str) -> str:
    section, _, rest = key.partition(".")
    if section in ONE_THING:
        return SAME_THING.get(section, section)
    if section == "dpo" and rest.partition(".")[0] in ("loss", *LOSS_KEYS):
        return "dpo.loss"
    return key


def _faults(experiment: Experiment) -> list[str]:
    """Arms that train with faults switched on: they show what a fault costs, and stand for no method."""
    faults = {name: experiment.arm(name).dpo.faults for name in experiment.arms}
    return [
        f"arm {name} trains with faults switched on (dpo.faults): {found.describe()}"
        for name, found in faults.items()
        if found.on
    ]


def _several_things(experiment: Experiment) -> list[str]:
    """Arms that differ from every other arm in more than one thing. A grid of two keys has none."""
    things = {frozenset(pair): differing_things(experiment, *pair) for pair in combinations(experiment.arms, 2)}
    found: dict[frozenset[str], str] = {}
    for name in experiment.arms:
        own = {pair: keys for pair, keys in things.items() if name in pair and keys}
        if not own:
            continue
        pair = min(own, key=lambda pair: len(own[pair]))
        if len(own[pair]) > 1:
            one, other = (arm for arm in experiment.arms if arm in pair)
            keys = _and(own[pair])
            found[pair] = f"{one} and {other} differ in {keys}: a difference of results may come of either"
    return list(found.values())


def _budgets(experiment: Experiment) -> list[str]:
    budgets = {name: arm_budget(experiment, name, experiment.prompts.held_out) for name in experiment.arms}
    found = []
    for key, what in SPENT.items():
        arms: dict[int, list[str]] = {}
        for name, budget in budgets.items():
            arms.setdefault(getattr(budget, key), []).append(name)
        if max(arms) - min(arms) > ROUNDING * max(arms):
            spent = "; ".join(f"{_and(names)} {amount:,}" for amount, names in sorted(arms.items(), reverse=True))
            found.append(f"the arms' budgets differ in {what}: {spent}")
    return found


def _judges(experiment: Experiment, digest: Digest) -> list[str]:
    """Arms that are measured by different judges."""
    used = {name: experiment.evaluation_judge(name) for name in experiment.arms}
    if len({digest(spec) for spec in used.values()}) < 2:
        return []
    named = ", ".join(f"{name} {spec.use}" for name, spec in used.items())
    return [f"each arm is measured by its own judge ({named}): their rewards compare only with evaluation.judge set"]


def _rowwise(experiment: Experiment) -> list[str]:
    """Arms that go through a dataset's rows, whatever their prompts."""
    parts = {name: parts_of(experiment.arm(name).source) for name in experiment.arms}
    return [
        name
        for name, sources in parts.items()
        if any(isinstance(part, SourceSpec) and part.dataset and part.match == "rows" for part in sources)
    ]


def _other_prompts(experiment: Experiment, own_prompts: Collection[str]) -> list[str]:
    own = [name for name in experiment.arms if name in own_prompts]
    others = [name for name in experiment.arms if name not in own_prompts]
    if not own or not others:
        return []
    verb = "trains" if len(own) == 1 else "train"
    return [f"{_and(own)} {verb} on the dataset's own prompts, {_and(others)} on the experiment's"]


def _answer_limits(experiment: Experiment) -> list[str]:
    limits = {name: experiment.arm(name).sampling.max_tokens for name in experiment.arms}
    if experiment.evaluation.max_tokens is not None or len(set(limits.values())) < 2:
        return []
    named = ", ".join(f"{name} {limit}" for name, limit in limits.items())
    return [f"held-out answers end at different lengths ({named} tokens): evaluation.max_tokens makes them equal"]


def _no_divergence(experiment: Experiment) -> list[str]:
    evaluation = experiment.evaluation
    if (evaluation.temperature, evaluation.top_p) == (1.0, 1.0):
        return []
    shown = f"evaluation.temperature {evaluation.temperature:g} and top_p {evaluation.top_p:g}"
    return [f"{shown} are not 1, so KL is not measured and no arms can be compared at equal KL"]


def _one_seed(experiment: Experiment) -> list[str]:
    if len(experiment.seeds) > 1 or len(experiment.arms) < 2:
        return []
    return ["one seed: intervals are over prompts only, and do not tell what another training seed would give"]


def _and(names: Collection[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
