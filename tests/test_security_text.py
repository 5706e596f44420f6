"""Text of models, judges, datasets and file names: shown as it is, on a terminal, in Markdown and in HTML."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile_runs import TEXTS, UNSEEN, Told, cli, copied, edited_json, edited_yaml, reading, small_run
from test_loop import World, experiment
from test_model_card import card_of

from online_dpo.display.markdown import cell, escaped
from online_dpo.files import digest
from online_dpo.records import read_held_out, read_prompts, write_held_out, write_prompts
from online_dpo.store import RunStore
from online_dpo.types import Message


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which every text that a model, a judge or a file can give is hostile, in a folder with such a name."""
    clean = small_run(tmp_path_factory.mktemp("made") / "run")
    root = copied(clean, tmp_path_factory.mktemp("received")).rename(
        tmp_path_factory.mktemp("named") / "run \x1b[2J [bold red]x `<img src=x>`"
    )
    for folder in sorted(root.glob("arms/*/seed_*/round_*")):
        _hostile_answers(folder)
        _hostile_metrics(folder / "metrics.json")
    prompts = {
        split: [
            dataclasses.replace(one, messages=(Message("user", TEXTS[i % len(TEXTS)]),)) for i, one in enumerate(own)
        ]
        for split, own in read_prompts(root / "prompts.parquet").items()
    }
    write_prompts(root / "prompts.parquet", prompts)
    edited_yaml(root, model=TEXTS[3] + TEXTS[2], output=TEXTS[3], judge_cache=TEXTS[3])
    edited_json(root / "manifest.json", {"packages": {text: text for text in TEXTS}, "online_dpo": TEXTS[2]})
    return root


def _hostile_answers(folder: Path) -> None:
    rows = read_held_out(folder / "held_out.parquet")
    changed = [
        dataclasses.replace(row, candidate=dataclasses.replace(row.candidate, text=TEXTS[i % len(TEXTS)]))
        for i, row in enumerate(rows)
    ]
    (folder / "held_out.parquet").unlink()  # another round may share the file
    write_held_out(folder / "held_out.parquet", changed)
    record = json.loads((folder / "stages" / "evaluate.json").read_text(encoding="utf-8"))
    edited_json(
        folder / "stages" / "evaluate.json",
        {"outputs": {**record["outputs"], "held_out.parquet": digest(folder / "held_out.parquet")}},
    )


def _hostile_metrics(file: Path) -> None:
    metrics = json.loads(file.read_text(encoding="utf-8"))
    if "judge" in metrics:
        metrics["judge"] |= {"reasons": {text: 3 for text in TEXTS}, "details": {text: 0.5 for text in TEXTS}}
        metrics["pairs"]["dropped"] = {text: 2 for text in TEXTS}
        metrics["train"] |= {"loss": TEXTS[3], "reference_from": TEXTS[3]}
    metrics |= {"reused": list(TEXTS), "policy": {"id": TEXTS[3], "digest": TEXTS[3]}}
    edited_json(file, metrics)


def harmful(text: str) -> list[str]:
    """Where `text` holds characters that a terminal or an eye obeys."""
    return [text[max(0, at - 30) : at + 10] for at, char in enumerate(text) if char in UNSEEN]


def harmless(text: str) -> bool:
    return not harmful(text)


def check_said(said: dict[str, Told]) -> None:
    for name, told in said.items():
        assert told.status == 0, (name, told.err)
        assert harmless(told.out) and harmless(told.err), name


def test_no_control_sequence_reaches_the_terminal(hostile: Path, tmp_path: Path) -> None:
    said = reading(hostile, tmp_path)
    check_said(said)
    shown = " ".join(said["show"].out.split())
    assert "<script>window.hacked = 1</script>" in shown
    assert "{{ 7 * 7 }}" in shown
    assert "[bold red]markup[/] [link=https://example.com]x[/link]" in shown, "read as rich's markup"


def test_an_error_repeats_no_control_sequence() -> None:
    name = f"no such {TEXTS[3]}".replace("\0", "")
    assert harmless(cli("show", name).refused)
    assert harmless(cli("check", f"{name}.yaml").refused)


@pytest.mark.slow
def test_the_report_of_hostile_texts_is_text(hostile: Path, tmp_path: Path) -> None:
    """The page in a browser: test_report_browser.py. Here the Markdown, and what the command says."""
    told = cli("report", hostile, "--out", tmp_path / "report")
    check_said({"report": told})
    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert harmful(markdown) == []
    active, images = rendered(markdown)
    assert active == []
    assert all(image.startswith("figures/") for image in images) and images
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert harmful(page) == []
    assert "<script>window" not in page and "<img src=x" not in page and ">49<" not in page


def rendered(markdown: str) -> tuple[list[str], list[str]]:
    """HTML and links that a Markdown renderer makes of `markdown`, and the addresses of its images."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown)
    flat = [part for token in tokens for part in (token, *(token.children or ()))]
    active = [f"{one.type} {one.content}" for one in flat if one.type in ("html_inline", "html_block", "link_open")]
    return active, [str(one.attrs["src"]) for one in flat if one.type == "image"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("write", [cell, escaped])
def test_a_cell_of_markdown_is_one_cell_without_markup(write: Any, text: str) -> None:
    from markdown_it import MarkdownIt

    table = f"| a | b |\n| --- | --- |\n| {write(text)} | x |\n"
    assert rendered(table) == ([], [])
    tokens = MarkdownIt("commonmark").enable("table").parse(table)
    assert sum(token.type == "td_open" for token in tokens) == 2
    assert not any(child.type == "code_inline" for token in tokens for child in token.children or ())
    assert harmless(write(text))


@pytest.mark.parametrize("link", ["[a]: https://x", "[a][b]", "[a]\\(b)", "<https://x>", "\\[a](b)", "![a][b]", "`|`"])
def test_no_form_of_a_link_gets_through(link: str) -> None:
    for write in (cell, escaped):
        assert rendered(f"# {write(link)}\n") == ([], [])
        assert rendered(f"{write(link)}\n\n[a] [b] ![a]\n") == ([], [])


def test_model_cards_hold_no_markup_of_a_name(tmp_path: Path) -> None:
    """A model's folder may be called anything; the judge's name and the loss are restricted by the schema."""
    name = "m | <img src=x onerror=alert(1)> `code` [x](https:y) ---\n- \x1b[31m."
    spec = experiment(model=f"/models/{name}", arms={"on_policy": {}}, rounds=1)
    RunStore.create(tmp_path / "run", spec, {"model": {"origin": "folder", "digest": "0" * 64}})
    World(tmp_path / "run", spec).go()
    card = card_of(World(tmp_path / "run", spec), "on_policy", 1)
    assert harmless(card)
    _, head, body = card.split("---\n", 2)
    assert rendered(body) == ([], [])
    assert yaml.safe_load(head)["base_model"] == name


def test_a_trackers_names_are_plain() -> None:
    from online_dpo.tracking.figures import tracked_round

    row = {"arm": "a", "seed": 0, "round": 1, "judge": {text: 1.0 for text in TEXTS}}
    names = tracked_round(row, 0).figures
    assert len(names) >= len(TEXTS) - 1
    assert all(
        set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_. -/") for name in names
    )
