"""A run's own experiment.yaml, manifest and plans: edited, cut off or of another form, resuming stops at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from online_dpo.config import Experiment, validate_experiment
from online_dpo.errors import RunFolderError
from online_dpo.experiment_seal import check_seal
from online_dpo.manifest_check import check_initial, check_manifest, check_pinned
from online_dpo.store import dump_experiment
from online_dpo.yaml_file import read_yaml

EXPERIMENT = {
    "name": "x",
    "model": "m",
    "prompts": {"path": "p", "per_round": 2, "held_out": 2},
    "judge": {"use": "judges.length:LengthJudge", "unit": "words"},
    "arms": {"a": {}, "b": {"dpo": {"beta": 0.2}}},
}
MANIFEST = {"folder": "f", "judges": {}, "model": {"digest": "0"}, "prompts": {"digest": "0"}, "datasets": {}}
POLICY = {"after_round": 1, "id": "a", "digest": "0"}
PINNED = {"round": 2, "prompts": ["p"], "start": POLICY, "source": POLICY, "reference": POLICY}


def written(folder: Path, change: tuple[str, str] = ("", "")) -> tuple[Path, Experiment]:
    """The experiment as a run's folder holds it, with one text in place of another."""
    file = folder / "experiment.yaml"
    file.write_text(dump_experiment(validate_experiment(EXPERIMENT, "x")).replace(*change, 1), encoding="utf-8")
    return file, validate_experiment(read_yaml(file), str(file))


def test_what_was_written_is_whole(tmp_path: Path) -> None:
    file, experiment = written(tmp_path)
    check_seal(file, experiment)
    assert experiment == validate_experiment(EXPERIMENT, "x")


@pytest.mark.parametrize("change", [("beta: 0.1", "beta: 0.9"), ("name: x", "name: y"), ("name: x", "# mine\nname: x")])
def test_an_edited_one_is_known_by_its_digest(tmp_path: Path, change: tuple[str, str]) -> None:
    with pytest.raises(
        RunFolderError, match=r"experiment\.yaml was edited after the run began .*: restore it; to chan"
    ):
        check_seal(*written(tmp_path, change))


def test_the_line_ends_of_another_system_are_no_edit(tmp_path: Path) -> None:
    file, experiment = written(tmp_path)
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    check_seal(file, experiment)


def test_cut_off_at_any_line_it_is_not_whole(tmp_path: Path) -> None:
    """Half of it may be right YAML, and every key that is lost would come back with its default."""
    file, experiment = written(tmp_path)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    refused = 0
    for kept in range(1, len(lines) - 1):
        file.write_text("".join(lines[:kept]), encoding="utf-8")
        with pytest.raises(RunFolderError, match=r"is not whole \(no '[\w.]+' in it\)|cannot be read"):
            check_seal(file, experiment)
        refused += 1
    assert refused > 40


def test_one_of_an_earlier_version_has_no_digest(tmp_path: Path) -> None:
    file, experiment = written(tmp_path)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:-1]), encoding="utf-8")
    check_seal(file, experiment)


def places(data: Any, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [before] if before else []
    if isinstance(data, dict):
        found += [place for key, value in data.items() for place in places(value, (*before, key))]
    return found


def changed(data: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(data))
    here = copy
    for key in place[:-1]:
        here = here[key]
    here[place[-1]] = value
    return dict(copy)


@pytest.mark.parametrize("place", places(MANIFEST), ids=".".join)
@pytest.mark.parametrize("value", [None, 7, []], ids=str)
def test_a_manifest_of_another_form_is_one_line(place: tuple[str, ...], value: Any) -> None:
    check_manifest(MANIFEST, Path("manifest.json"))
    check_manifest({key: part for key, part in MANIFEST.items() if key != "datasets"}, Path("manifest.json"))
    with pytest.raises(RunFolderError, match=rf"^manifest\.json is damaged: '{place[0]}"):
        check_manifest(changed(MANIFEST, place, value), Path("manifest.json"))


@pytest.mark.parametrize("place", [place for place in places(PINNED) if place != ("round",)], ids=".".join)
def test_a_plan_of_another_form_is_one_line(place: tuple[str, ...]) -> None:
    check_pinned(PINNED, Path("round.json"))
    averaged = {"averaged_for_round": 2, "id": "a", "digest": "0"}
    check_pinned({**PINNED, "reference": averaged}, Path("round.json"))
    values: tuple[Any, ...] = (None, {}, "x" if place[-1] not in ("id", "digest") else 7, -1)
    for value in values:
        with pytest.raises(RunFolderError, match=rf"^round\.json is damaged: '{place[0]}'"):
            check_pinned(changed(PINNED, place, value), Path("round.json"))


@pytest.mark.parametrize(
    "record", [{}, {"digest": "0", "token_ids": 7, "logprobs": []}, {"digest": 0, "token_ids": []}]
)
def test_a_record_of_the_initial_policy_of_another_form_is_one_line(record: dict[str, Any]) -> None:
    check_initial({"digest": "0", "token_ids": [1, 2], "logprobs": [-0.5]}, Path("initial.json"))
    with pytest.raises(RunFolderError, match=r"^initial\.json is damaged"):
        check_initial(record, Path("initial.json"))
