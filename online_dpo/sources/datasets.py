"""The datasets that an experiment's arms take pairs or answers from: read once, before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from online_dpo.arms import Arm
from online_dpo.config import ArmSettings, Experiment
from online_dpo.dataset_rows import DatasetRows, Reading, describe_dropped, read_dataset
from online_dpo.errors import ConfigError, DataError, RunFolderError
from online_dpo.files import digest_json
from online_dpo.prompts import prompts_for_round
from online_dpo.source_spec import DatasetSpec, SourceSpec, parts_of
from online_dpo.types import Prompt

Match = Literal["prompts", "rows"]
SFT = "sft"
"""The key of the dataset that the stage `sft` learns from."""


def read_datasets(experiment: Experiment, reading: Reading) -> dict[str, DatasetRows]:
    """Every dataset of `experiment`, by `dataset_key`.

    Raises `DataError` or `ConfigError`, naming the arm: nothing there, no usable row, too few rows for a round, no row
    for any training prompt where the round's own prompts are asked for, a margin that no label reaches.
    """
    found: dict[str, DatasetRows] = {}
    for name in experiment.arms:
        settings = experiment.arm(name)
        for source in dataset_sources(settings):
            key = dataset_key(source)
            try:
                if key not in found:
                    found[key] = read_dataset(_spec(source), reading, answers_alone=source.spin is not None)
                _check_round(found[key], source, reading.train, _wanted(experiment, settings, source))
            except DataError as error:
                raise DataError(f"arm {name}: {error}") from error
            _check_margin(settings, source, name)
    if experiment.sft is not None:
        try:
            found[SFT] = read_dataset(experiment.sft.dataset, reading, answers_alone=experiment.sft.on == "chosen")
        except DataError as error:
            raise DataError(f"sft: {error}") from error
    return found


def dataset_sources(settings: ArmSettings) -> Iterator[SourceSpec]:
    """The parts of an arm's source that read a dataset."""
    for part in parts_of(settings.source):
        if isinstance(part, SourceSpec) and part.kind in ("dataset", "spin"):
            yield part


def dataset_key(source: SourceSpec) -> str:
    """Names a dataset within a run: equal for arms that read the same one in the same way."""
    return digest_json([source.kind, _spec(source).model_dump()])[:16]


def rows_of(arm: Arm) -> DatasetRows:
    """The dataset of an arm whose source is one."""
    key = dataset_key(source_of(arm))
    if key not in arm.run.datasets:
        raise RunFolderError(f"{arm.label}: its dataset was not read before the run began")
    return arm.run.datasets[key]


def source_of(arm: Arm) -> SourceSpec:
    """The arm's source, where it is a dataset's."""
    if not isinstance(arm.settings.source, SourceSpec):
        raise ValueError(f"{arm.label}: source {arm.settings.source} is no dataset")
    return arm.settings.source


def match_of(rows: DatasetRows, source: SourceSpec, train: Sequence[Prompt]) -> Match:
    """Whether rounds keep their own prompts or take the dataset's rows whatever their prompts."""
    if source.match != "auto":
        return source.match
    return "prompts" if all(prompt.id in rows.of_prompt for prompt in train) else "rows"


def with_own_prompts(experiment: Experiment, datasets: Mapping[str, DatasetRows], train: Sequence[Prompt]) -> set[str]:
    """The arms whose rounds take a dataset's rows whatever their prompts."""
    return {
        name
        for name in experiment.arms
        for source in dataset_sources(experiment.arm(name))
        if match_of(datasets[dataset_key(source)], source, train) == "rows"
    }


def dataset_prompts(arm: Arm, index: int) -> tuple[Prompt, ...]:
    """The prompts of round `index` (1-based): the run's own, or those of the dataset's rows.

    Rows are dealt as training prompts are (`prompts.prompts_for_round`): an order seeded by the arm's seed, without
    replacement over the rounds, anew when it is used up.
    """
    train, rows, per_round = arm.run.train_prompts, rows_of(arm), arm.run.experiment.prompts.per_round
    if match_of(rows, source_of(arm), train) == "prompts":
        return prompts_for_round(train, arm.seed, index, per_round)
    return prompts_for_round([row.prompt for row in rows.rows], arm.seed, index, per_round)


def describe_datasets(datasets: Mapping[str, DatasetRows]) -> list[str]:
    """A line for each dataset: what of it is used."""
    return [
        f"dataset {data.path}: {len(data.rows)} rows, dropped: {describe_dropped(data.dropped)}"
        for data in datasets.values()
    ]


def dataset_records(datasets: Mapping[str, DatasetRows]) -> dict[str, dict[str, object]]:
    """What the manifest keeps of the datasets."""
    return {
        key: {"path": data.path, "digest": data.digest, "rows": len(data.rows), "dropped": data.dropped}
        for key, data in datasets.items()
    }


def check_datasets_unchanged(
    root: Path, datasets: Mapping[str, DatasetRows], records: Mapping[str, Mapping[str, object]]
) -> None:
    """Raise `RunFolderError` when a dataset is not the one that the run in folder `root` began with."""
    for key, data in datasets.items():
        if data.digest != records.get(key, {}).get("digest"):
            raise RunFolderError(
                f"{root}: the dataset {data.path} is not the one that the run began with; restore it, or start a run "
                "under another name"
            )


def _spec(source: SourceSpec) -> DatasetSpec:
    found = source.dataset or source.spin
    if found is None:
        raise ValueError(f"source {source.kind} reads no dataset")
    return found


def _wanted(experiment: Experiment, settings: ArmSettings, source: SourceSpec) -> int:
    """How many rows a round takes at least."""
    return experiment.prompts.per_round if settings.source is source else 1


def _check_round(rows: DatasetRows, source: SourceSpec, train: Sequence[Prompt], wanted: int) -> None:
    used = f"{rows.path} has {len(rows.rows)} usable rows (dropped: {describe_dropped(rows.dropped)})"
    if match_of(rows, source, train) == "prompts":
        if not rows.of_prompt:
            raise DataError(f"{used}, none of them for a training prompt: set match: rows, or take its own prompts")
    elif len(rows.rows) < wanted:
        raise DataError(f"{used}, but prompts.per_round is {wanted}")


def _check_margin(settings: ArmSettings, source: SourceSpec, name: str) -> None:
    if not source.relabel and settings.pairing.min_margin > 1:
        raise ConfigError(
            f"arm {name}: pairing.min_margin is {settings.pairing.min_margin:g}, and a dataset's labels are 1 and 0: "
            "no pair would be left"
        )
