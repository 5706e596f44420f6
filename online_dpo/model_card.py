"""README.md of a saved policy: what it is, what it was trained on, how it is loaded. No digest counts it."""

from __future__ import annotations

from pathlib import Path

import yaml

import online_dpo
from online_dpo.arms import Arm
from online_dpo.config import Experiment
from online_dpo.display import interval
from online_dpo.display.markdown import cell
from online_dpo.policies import read_policy
from online_dpo.rounds import Pinned
from online_dpo.store import RunStore
from online_dpo.types import Policy


def write_model_card(arm: Arm, index: int, pinned: Pinned, pairs: int, folder: Path) -> None:
    """Write `folder`/README.md for the policy in it, which round `index` trained on `pairs` pairs (0: on groups)."""
    base = base_name(arm.run.store, arm.run.experiment)
    adapter = arm.run.experiment.lora is not None
    rows = {
        "experiment": arm.run.experiment.name,
        "arm": arm.name,
        "seed": str(arm.seed),
        "round": f"{index} of {arm.settings.rounds}",
        "algorithm": arm.settings.algorithm,
        "loss": arm.settings.describe_objective(),
        "pairs of this round": str(pairs) if pairs else "",
        "judge": arm.settings.judge.use,
        "began with": _policy(pinned.start),
        "reference": _policy(pinned.reference),
        "initial model": f"{base} ({arm.run.initial.digest[:12]})",
        "KL of what it began with to the initial model": _divergence(arm, index - 1),
        "digest of these files": read_policy(folder, verify=False).digest,
    }
    table = "\n".join(f"| {name} | {cell(value)} |" for name, value in rows.items() if value)
    text = (
        f"{_front_matter(base, adapter)}# {cell(arm.name)}, seed {arm.seed}, round {index}\n\n"
        f"A policy that online-dpo {online_dpo.__version__} trained; what was measured of it stands in metrics.json of "
        f"its round.\n\n| | |\n| --- | --- |\n{table}\n\n{_loading(adapter)}"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def base_name(store: RunStore, experiment: Experiment | None = None) -> str:
    """The initial model as others may know it: a hub id or a packaged model's name; of a folder only its last name.

    `experiment`: the run's, where it is known; reading it takes as long as a small round's stages.
    """
    name = (experiment or store.experiment).model
    return Path(name).name if store.manifest.get("model", {}).get("origin") == "folder" else name


def _front_matter(base: str, adapter: bool) -> str:
    data = {
        "base_model": base,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "online-dpo", *(["lora"] if adapter else [])],
    }
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n"


def _policy(policy: Policy) -> str:
    return f"{policy.id} ({policy.digest[:12]})"


def _divergence(arm: Arm, index: int) -> str:
    """As measured after round `index`; empty for the initial policy itself and where it was not measured."""
    if index == 0 or not arm.folder(index).closed:
        return ""
    measured = arm.folder(index).metrics["held_out"].get("kl_initial")
    return "" if measured is None else f"{interval(measured)} nats a sequence"


def _loading(adapter: bool) -> str:
    module, name = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    note = "" if not adapter else "\nIt looks for the base model under the name in adapter_config.json.\n"
    return f'```python\nfrom {module} import {name}\n\nmodel = {name}.from_pretrained(".")\n```\n{note}'
