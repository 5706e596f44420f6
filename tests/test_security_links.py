"""Links and special files in a run folder: no command reads, writes or deletes through one; names lead nowhere else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hostile_runs import cli, copied, round_of, small_run
from test_loop import World, experiment

from online_dpo.config import validate_experiment
from online_dpo.errors import ConfigError, RunFolderError
from online_dpo.files import digest, write_text
from online_dpo.links import refuse_links
from online_dpo.store import RunStore


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        return small_run(tmp_path_factory.mktemp("links") / "run")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


PLACES = (
    "experiment.yaml",
    "manifest.json",
    "prompts.parquet",
    "verdicts.sqlite",
    ".lock",
    "progress.json",
    ".progress.json.tmp",
    "report",
    "arms",
    "arms/on_policy",
    "arms/on_policy/seed_0/round_01",
    "arms/on_policy/seed_0/round_01/round.json",
    "arms/on_policy/seed_0/round_01/candidates.parquet",
    "arms/on_policy/seed_0/round_01/held_out.parquet",
    "arms/on_policy/seed_0/round_01/metrics.json",
    "arms/on_policy/seed_0/round_01/stages",
    "arms/on_policy/seed_0/round_01/stages/sample.json",
    "arms/on_policy/seed_0/round_01/policy",
    "arms/on_policy/seed_0/round_01/policy/model.safetensors",
    "arms/on_policy/seed_0/round_01/.train.tmp",
)


@pytest.mark.parametrize("place", PLACES)
def test_a_link_is_refused_wherever_it_lies(run: Path, tmp_path: Path, place: str) -> None:
    """What it leads to is a good file or folder: the very one that stood there."""
    root = copied(run, tmp_path)
    file, elsewhere = root / place, tmp_path / "elsewhere"
    if file.exists():
        file.rename(elsewhere)
    else:
        elsewhere.write_text("private", encoding="utf-8")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(elsewhere)
    before = digest(elsewhere)
    with pytest.raises(RunFolderError, match=f"{place} is a symbolic link"):
        RunStore.open(root) if RunStore.exists(root) else refuse_links(root)
    assert digest(elsewhere) == before


def test_every_reading_command_refuses_a_link(run: Path, tmp_path: Path) -> None:
    root = copied(run, tmp_path)
    (round_of(root) / "notes.txt").symlink_to("/etc/passwd")
    out = tmp_path / "out"
    commands: tuple[list[str | Path], ...] = (
        ["show", root], ["watch", root], ["compare", root], ["report", root], ["resume", root],
        ["export", root, "--format", "parquet", "--out", out],
        ["fork", root, "--arm", "on_policy", "--round", "1", "--set", "dpo.beta=0.3"],
        ["judge", "ask", root, "--name", "me"],
    )  # fmt: skip
    for command in commands:
        assert "notes.txt is a symbolic link" in cli(*command).refused, command
    assert not out.exists()


def test_a_pipe_is_refused_instead_of_waited_for(run: Path, tmp_path: Path) -> None:
    root = copied(run, tmp_path)
    (round_of(root) / "metrics.json").unlink()
    os.mkfifo(round_of(root) / "metrics.json")
    with pytest.raises(RunFolderError, match=r"metrics\.json is neither a file nor a folder"):
        RunStore.open(root)


def test_the_run_folder_itself_may_be_reached_by_a_link(run: Path, tmp_path: Path) -> None:
    """Where it lies is the user's choice; so is what a tracker keeps in its own folder."""
    (tmp_path / "latest").symlink_to(copied(run, tmp_path))
    (tmp_path / "latest" / "wandb").mkdir()
    (tmp_path / "latest" / "wandb" / "latest-run").symlink_to("run-1")
    assert RunStore.open(tmp_path / "latest").round("on_policy", 0, 1).closed


@pytest.mark.parametrize("place", ["policy", "."])
def test_giving_up_a_policy_deletes_nothing_elsewhere(tmp_path: Path, place: str) -> None:
    """The link is planted while the run is open: the folder's own, or one above it."""
    world = World(tmp_path / "run", experiment()).go()
    folder = world.folder("on_policy", 1)
    elsewhere = tmp_path / "elsewhere"
    planted = folder.path / place
    planted.rename(elsewhere)
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    planted.symlink_to(elsewhere)
    before = digest(elsewhere)
    with pytest.raises(RunFolderError, match="is a symbolic link"):
        folder.prune("policy")
    record = folder.done("train")
    assert record is not None
    with pytest.raises(RunFolderError, match="is a symbolic link"):
        folder.verify(record)
    assert digest(elsewhere) == before


def test_writing_does_not_go_through_a_link_planted_beside(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.write_text("mine", encoding="utf-8")
    (tmp_path / ".a.json.tmp").symlink_to(private)
    write_text(tmp_path / "a.json", "ours")
    assert (private.read_text(encoding="utf-8"), (tmp_path / "a.json").read_text(encoding="utf-8")) == ("mine", "ours")


def test_a_new_run_is_not_laid_into_a_folder_with_links(tmp_path: Path) -> None:
    """The folder is there and holds no run yet: what is written first would go through the link."""
    from online_dpo.runs import open_or_create

    class Asked:
        root = tmp_path / "runs" / "new"

    Asked.root.mkdir(parents=True)
    (Asked.root / "prompts.parquet").symlink_to(tmp_path / "private")
    with pytest.raises(RunFolderError, match="is a symbolic link"):
        open_or_create(Asked())  # type: ignore[arg-type] # stops before it needs more than a folder
    assert not (tmp_path / "private").exists()


@pytest.mark.parametrize("output", ["../../../../../planted", "/tmp/planted", "..", "", "a/b", "a\0b", "a\\b"])  # noqa: S108
def test_a_record_cannot_name_a_file_elsewhere(run: Path, tmp_path: Path, output: str) -> None:
    """A fork would link it to the same name beside the new run."""
    root = copied(run, tmp_path)
    file = round_of(root) / "stages" / "pair.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(record | {"outputs": {output: "0" * 64}}), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"pair\.json is damaged"):
        RunStore.open(root)


@pytest.mark.parametrize(
    "record", [{"stage": "../pair"}, {"inputs": []}, {"outputs": "x"}, {"info": None}, {"more": 1}, {"stage": 3}]
)
def test_a_record_of_another_form_is_refused(run: Path, tmp_path: Path, record: dict[str, object]) -> None:
    root = copied(run, tmp_path)
    file = round_of(root) / "stages" / "pair.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | record), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"pair\.json is damaged"):
        RunStore.open(root)


BAD_NAMES = ("../x", "..", ".", "/tmp/x", "a/b", "a\\b", "", "a\nb", "a\0b", ".hidden", "é", "x" * 65, "~")  # noqa: S108


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_of_runs_and_arms_cannot_leave_their_folder(name: str) -> None:
    data = experiment().model_dump(mode="json")
    changes: list[dict[str, Any]] = [{"name": name}, {"arms": {name: {}}}]
    for change in changes:
        with pytest.raises(ConfigError, match="letters, digits"):
            validate_experiment(data | change, "test")
