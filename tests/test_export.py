"""A run's pairs as TRL takes them, and its stages as `datasets` reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_loop import HELD_OUT, TRAIN, World, experiment

from online_dpo.errors import ConfigError, RunFolderError
from online_dpo.export import Selection, export_stages, export_trl, parse_rounds
from online_dpo.export.trl import decoding, text_after
from online_dpo.records import read_candidates, read_pairs, write_prompts
from online_dpo.store import RunStore
from online_dpo.types import Candidate, Pair, Prompt

DIALOGUES = {"path": "p.jsonl", "per_round": 3, "held_out": 3, "template": "dialogue"}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def finished_run(root: Path, *, chat: bool = False, **changes: Any) -> World:
    """A run of two arms and two rounds whose folder is complete."""
    root.mkdir(parents=True)
    write_prompts(root / "prompts.parquet", {"train": TRAIN, "held_out": HELD_OUT})
    manifest = {"model": {"name": "m", "origin": "hub", "digest": "0" * 64}, "prompts": {"chat_template": chat}}
    RunStore.create(root, experiment(**changes), manifest)
    return World(root, experiment(**changes)).go()


def decode(ids: Sequence[int]) -> str:
    """Stands for a tokenizer's decoder: a word a token."""
    return "".join(f" {token}" for token in ids)


def rows(folder: Path) -> list[dict[str, Any]]:
    from datasets import load_dataset

    found: list[dict[str, Any]] = list(load_dataset("parquet", data_files=str(folder / "pairs.parquet"), split="train"))
    return found


def trained(world: World, arm: str, index: int) -> list[Pair]:
    """The pairs that a round really trained on."""
    folder = world.folder(arm, index).path
    prompts = {prompt.id: prompt for prompt in TRAIN}
    return read_pairs(folder / "pairs.parquet", prompts, read_candidates(folder / "candidates.parquet"))


def of_round(found: Sequence[Mapping[str, Any]], arm: str, index: int) -> list[Mapping[str, Any]]:
    return [row for row in found if (row["arm"], row["round"]) == (arm, index)]


# --- pairs ---


def test_plain_text_pairs_are_those_that_were_trained_on(tmp_path: Path) -> None:
    world = finished_run(tmp_path / "run")
    count = export_trl(world.run.store, Selection(), tmp_path / "out", decode)
    found = rows(tmp_path / "out")
    assert len(found) == count > 0
    for arm in ("on_policy", "self_offline"):
        for index in (1, 2):
            pairs = trained(world, arm, index)
            assert [
                (row["prompt"], row["chosen"], row["rejected"], row["chosen_score"], row["rejected_score"])
                for row in of_round(found, arm, index)
            ] == [
                (
                    decode(p.prompt.token_ids),
                    decode(p.chosen.token_ids),
                    decode(p.rejected.token_ids),
                    p.chosen_score,
                    p.rejected_score,
                )
                for p in pairs
            ]
            assert [(row["chosen_ended"], row["rejected_ended"]) for row in of_round(found, arm, index)] == [
                (p.chosen.finish_reason == "stop", p.rejected.finish_reason == "stop") for p in pairs
            ]
    assert {row["seed"] for row in found} == {0}


def test_chats_stay_chats(tmp_path: Path) -> None:
    """Behind a chat template the answer is a turn, as it was decoded: the template says what stands before it."""
    world = finished_run(tmp_path / "run", chat=True)
    export_trl(world.run.store, Selection("on_policy", 0, range(1, 2)), tmp_path / "out", decode)
    [first, *_] = trained(world, "on_policy", 1)
    [row, *_] = rows(tmp_path / "out")
    assert row["prompt"] == [{"role": "user", "content": first.prompt.text}]
    assert row["chosen"] == [{"role": "assistant", "content": first.chosen.text}]
    assert row["rejected"] == [{"role": "assistant", "content": first.rejected.text}]


def test_dialogues_are_the_text_that_the_policy_saw(tmp_path: Path) -> None:
    """The tokenizer has no template of its own by which TRL would write the turns."""
    world = finished_run(tmp_path / "run", chat=True, prompts=DIALOGUES)
    export_trl(world.run.store, Selection("on_policy", 0, range(1, 2)), tmp_path / "out", decode)
    [first, *_] = trained(world, "on_policy", 1)
    [row, *_] = rows(tmp_path / "out")
    assert (row["prompt"], row["chosen"]) == (decode(first.prompt.token_ids), decode(first.chosen.token_ids))


def test_a_template_of_the_users_own_is_refused(tmp_path: Path) -> None:
    world = finished_run(tmp_path / "run", chat=True, prompts=DIALOGUES | {"template": "mine.jinja"})
    with pytest.raises(ConfigError, match=r"prompts\.template mine\.jinja: TRL takes chats by the tokenizer's own"):
        export_trl(world.run.store, Selection(), tmp_path / "out", decode)


def test_lines_hold_the_same_rows(tmp_path: Path) -> None:
    world = finished_run(tmp_path / "run")
    export_trl(world.run.store, Selection(), tmp_path / "a", decode)
    export_trl(world.run.store, Selection(), tmp_path / "b", decode, "jsonl")
    lines = (tmp_path / "b" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows(tmp_path / "a")


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(arm="on_policy"), {("on_policy", 1), ("on_policy", 2)}),
        (Selection(rounds=range(2, 3)), {("on_policy", 2), ("self_offline", 2)}),
        (Selection("self_offline", 0, range(0, 2)), {("self_offline", 1)}),
    ],
)
def test_some_rounds_alone(selection: Selection, expected: set[tuple[str, int]], tmp_path: Path) -> None:
    world = finished_run(tmp_path / "run")
    export_trl(world.run.store, selection, tmp_path / "out", decode)
    assert {(row["arm"], row["round"]) for row in rows(tmp_path / "out")} == expected


def test_the_card_tells_where_the_pairs_come_from_and_loads_them(tmp_path: Path) -> None:
    from datasets import load_dataset

    world = finished_run(tmp_path / "run")
    count = export_trl(world.run.store, Selection("on_policy"), tmp_path / "out", decode)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "- arm on_policy: seed 0, rounds 1 to 2, judge `judges.length:LengthJudge`" in card
    assert str(tmp_path) not in card
    assert yaml.safe_load(card.split("---")[1])["configs"] == [
        {"config_name": "default", "data_files": "pairs.parquet"}
    ]
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == count


# --- refusals ---


def test_a_changed_pair_file_is_refused(tmp_path: Path) -> None:
    world = finished_run(tmp_path / "run")
    file = world.folder("on_policy", 1).path / "pairs.parquet"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(RunFolderError, match="was changed after stage 'pair'"):
        export_trl(RunStore.open(world.root), Selection(), tmp_path / "out", decode)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    world = finished_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    export_trl(world.run.store, Selection(), tmp_path / "out", decode)
    before = (tmp_path / "out" / "pairs.parquet").read_bytes()
    for again in (tmp_path / "out", tmp_path / "out" / "pairs.parquet"):
        with pytest.raises(RunFolderError, match="not an empty folder"):
            export_trl(world.run.store, Selection("on_policy"), again, decode)
    assert (tmp_path / "out" / "pairs.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(arm="on_polcy"), r"--arm on_polcy: no such arm \(did you mean 'on_policy'\?\)"),
        (Selection(seed=7), "--seed 7: the run has 0"),
    ],
)
def test_what_is_not_in_the_run_is_named(selection: Selection, message: str, tmp_path: Path) -> None:
    world = finished_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        export_trl(world.run.store, selection, tmp_path / "out", decode)


def test_rounds_without_pairs_are_said(tmp_path: Path) -> None:
    world = finished_run(tmp_path / "run")
    with pytest.raises(RunFolderError, match="no pairs in the closed rounds"):
        export_trl(world.run.store, Selection(rounds=range(0, 1)), tmp_path / "out", decode)


@pytest.mark.parametrize(("text", "expected"), [("2", range(2, 3)), ("1-3", range(1, 4)), (" 0-0 ", range(0, 1))])
def test_rounds_are_read_with_both_ends(text: str, expected: range) -> None:
    assert parse_rounds(text) == expected


@pytest.mark.parametrize("text", ["", "3-1", "a", "1-", "-1", "1,2", "9999999"])
def test_other_rounds_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write a round or a first and a last one"):
        parse_rounds(text)


# --- stages ---


def test_datasets_reads_every_file_of_a_run(tmp_path: Path) -> None:
    """From the run folder itself, and from its copy: the same rows and the records' own columns."""
    from datasets import load_dataset

    world = finished_run(tmp_path / "run")
    copied = export_stages(world.run.store, Selection(), tmp_path / "out")
    files = sorted(world.root.rglob("*.parquet"))
    assert copied == len(files)
    assert {"candidates", "verdicts", "pairs", "held_out", "prompts"} <= {file.stem for file in files}
    for file in files:
        copy = tmp_path / "out" / file.relative_to(world.root)
        assert copy.read_bytes() == file.read_bytes()
    for kind in ("candidates", "verdicts", "pairs", "held_out", "prompts"):
        data_files = str(tmp_path / "out" / "**" / f"{kind}.parquet")
        found = load_dataset("parquet", data_files=data_files, split="train")
        assert len(found) > 0
        named = load_dataset(str(tmp_path / "out"), kind, split="train")
        assert len(named) == len(found)
    first = read_candidates(world.folder("on_policy", 1).path / "candidates.parquet")[0]
    loaded = load_dataset(
        "parquet", data_files=str(world.folder("on_policy", 1).path / "candidates.parquet"), split="train"
    )[0]
    assert (loaded["text"], tuple(loaded["token_ids"])) == (first.text, first.token_ids)
    assert loaded["logprobs"] == pytest.approx(first.logprobs)


def test_stages_of_some_rounds(tmp_path: Path) -> None:
    world = finished_run(tmp_path / "run")
    export_stages(world.run.store, Selection("on_policy", 0, range(1, 2)), tmp_path / "out")
    folders = {file.parent.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*.parquet")}
    assert folders == {".", "arms/on_policy/seed_0/round_01"}


# --- with a real tokenizer ---


def test_answers_go_on_with_the_space_that_a_decoder_drops(stories: Path) -> None:
    """A word piece "▁was" decodes to "was" when it stands first, and to " was" behind a prompt."""
    from online_dpo.models import load_tokenizer

    tokenizer: Any = load_tokenizer(stories)
    prompt_ids = tuple(tokenizer("The dog")["input_ids"])
    answer_ids = tuple(tokenizer("The dog was happy.")["input_ids"])[len(prompt_ids) :]
    answer = Candidate("p", 0, tokenizer.decode(answer_ids), (*answer_ids, tokenizer.eos_token_id), (), "stop", 0)
    prompt = Prompt("p", (), prompt_ids)
    assert text_after(prompt, answer, decoding(tokenizer)) == " was happy."
    assert decoding(tokenizer)(prompt_ids) == "The dog"
