"""A run folder from elsewhere, its files hostile: reading it ends in one line or goes well, and starts nothing."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_runs import cli, copied, edited_json, edited_yaml, reading, round_of, small_run

from online_dpo.errors import RunFolderError
from online_dpo.store import RunStore

DEEP = "[" * 100_000 + "]" * 100_000
PLANTED = """
from pathlib import Path
(Path(__file__).parent / "imported").write_text("yes")
class Judge:
    def score(self, prompt, candidates):
        return [0.0 for _ in candidates]
def loss(ratios, beta):
    return -beta * ratios.delta
"""


FUNCTION = {"function": "mine_said:loss"}


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("made") / "run")


def refused(root: Path) -> list[str]:
    """The lines of the commands that would not read `root`; those that would ended with 0."""
    told = reading(root, root.parent / "out")
    assert all(one.status in (0, 2) for one in told.values()), told
    return [one.refused for one in told.values() if one.status]


# --- reading starts nothing ---


def test_reading_imports_no_judge_and_no_loss_of_the_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module lies in the current folder, in the run folder and where the manifest says that the YAML lay."""
    root = copied(run, tmp_path)
    places = [tmp_path, root, tmp_path / "yaml"]
    for place in places:
        place.mkdir(exist_ok=True)
        (place / "planted_judge.py").write_text(PLANTED, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = {"use": "planted_judge:Judge"}
    edited_yaml(
        root,
        judge=judge,
        evaluation={"gold": judge, "judge": judge, "off_policy": 16},
        dpo={"loss": {"use": "planted_judge:loss"}},
        arms={"on_policy": {}, "self_offline": {"judge": judge, "source": "initial"}},
        trust_remote_code=True,
    )
    edited_json(root / "manifest.json", {"folder": str(places[-1])})
    assert refused(root) == []
    assert "planted_judge" not in sys.modules
    assert not any((place / "imported").exists() for place in places)


def test_resuming_says_whose_code_it_is_about_to_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resume` carries the experiment out, so it needs its judge: the line comes before the import."""
    root = copied(run, tmp_path)
    file = tmp_path / "planted_other.py"
    file.write_text("raise SystemError('imported')", encoding="utf-8")
    edited_yaml(root, judge={"use": "planted_other:Judge"})
    edited_json(root / "manifest.json", {"folder": str(tmp_path)})
    monkeypatch.setattr("online_dpo.runs.resolve_model", lambda *_, **__: None)
    monkeypatch.setattr("online_dpo.runs.check_unchanged", lambda *_: None)
    told = cli("resume", root)
    assert f"own code: judge 'planted_other:Judge' from {file} is no part of online-dpo" in told.out
    assert "SystemError: imported" in told.refused


@pytest.mark.parametrize("command", ["check", "run"])
def test_own_code_is_said_at_the_start(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, small_model: Path
) -> None:
    import yaml

    (tmp_path / "mine_said.py").write_text("def loss(ratios, beta):\n    raise ValueError('no')\n", encoding="utf-8")
    spec = {
        "name": "x", "model": str(small_model), "output": str(tmp_path / "runs"),
        "prompts": {"path": "p.jsonl", "per_round": 1, "held_out": 1},
        "judge": {"use": "judges.panel:PanelJudge", "judges": [{"use": "judges.function:FunctionJudge", **FUNCTION}]},
        "dpo": {"loss": {"use": "mine_said:loss"}},
    }  # fmt: skip
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    told = cli(command, tmp_path / "e.yaml")
    assert "no prompts at 'p.jsonl'" in told.refused
    where = f"from {tmp_path / 'mine_said.py'} is no part of online-dpo: it runs with your rights"
    assert told.out.splitlines() == [
        f"own code: function 'mine_said:loss' {where}", f"own code: loss 'mine_said:loss' {where}"
    ]  # fmt: skip


def test_reading_writes_to_no_file_that_the_folder_names(run: Path, tmp_path: Path) -> None:
    """`judge_cache` may name any database of the user's; the experiment is somebody else's."""
    other = tmp_path / "mine.sqlite"
    with sqlite3.connect(other) as base:
        base.execute("CREATE TABLE notes (text TEXT)")
    before = other.read_bytes()
    root = copied(run, tmp_path)
    edited_yaml(root, judge_cache=str(other))
    assert refused(root) == []
    assert other.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".sqlite") == ["mine.sqlite"]


def test_exporting_does_not_trust_a_models_code_because_the_folder_says_so(
    run: Path, tmp_path: Path, small_model: Path
) -> None:
    """A tokenizer with code of its own, in the model's folder that the run names; the run says to trust it."""
    import shutil

    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    (model / "tokenization_evil.py").write_text(PLANTED, encoding="utf-8")
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Judge", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    root = copied(run, tmp_path)
    edited_yaml(root, model=str(model), trust_remote_code=True)
    edited_json(root / "manifest.json", {"folder": str(tmp_path)})
    told = cli("export", root, "--out", tmp_path / "out")
    assert told.status in (0, 2), told
    assert not list(Path(tmp_path).rglob("imported"))
    assert not any(name.endswith("tokenization_evil") for name in sys.modules)


# --- files that are not what they were ---

FILES: dict[str, Callable[[Path], Path]] = {
    "manifest": lambda root: root / "manifest.json",
    "metrics": lambda root: round_of(root) / "metrics.json",
    "record": lambda root: round_of(root) / "stages" / "evaluate.json",
    "yaml": lambda root: root / "experiment.yaml",
}
TEXTS = (
    "",
    "null",
    "[]",
    '"x"',
    "{",
    "\x00",
    "{}x",
    DEEP,
    f'{{"a": {DEEP}}}',
    '{"round": NaN}',
    '{"round": 1e999}',
    "\ud800",
)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text)[:20])
def test_a_file_of_another_form_is_one_line(run: Path, tmp_path: Path, file: str, text: str) -> None:
    root = copied(run, tmp_path)
    FILES[file](root).write_bytes(text.encode("utf-8", "surrogatepass"))
    told = cli("show", root)
    assert told.refused


def test_a_json_file_that_would_fill_the_memory_is_not_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("online_dpo.files.MOST_JSON", 1_000)
    root = copied(run, tmp_path)
    with (round_of(root) / "metrics.json").open("a", encoding="utf-8") as file:
        file.write(" " * 1_000)
    assert "bytes are more than online-dpo writes" in cli("show", root).refused


WRONG: tuple[Any, ...] = (None, True, -1, 1e308, "x", [], {}, [[]], {"mean": "x", "low": {}, "high": None}, 10**400)


def values(data: Any, place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The places of all values in nested mappings."""
    found = [place] if place else []
    if isinstance(data, dict):
        found += [one for key, value in data.items() for one in values(value, (*place, key))]
    return found


def with_value(data: Any, place: tuple[str, ...], value: Any) -> Any:
    if not place:
        return value
    return {**data, place[0]: with_value(data[place[0]], place[1:], value)}


@pytest.mark.slow
@pytest.mark.parametrize("file", ["metrics", "manifest"])
def test_any_value_of_any_type_is_shown_or_refused(run: Path, tmp_path: Path, file: str) -> None:
    """Every value of the file replaced in turn, the wrong values taking turns; every reading command, no traceback."""
    sys.set_int_max_str_digits(0)
    root = copied(run, tmp_path)
    target = FILES[file](root)
    data = json.loads(target.read_text(encoding="utf-8"))
    places = values(data)
    ended = {0: 0, 2: 0}
    for number, place in enumerate(places):
        target.write_text(json.dumps(with_value(data, place, WRONG[number % len(WRONG)])), encoding="utf-8")
        for command in ("show", "watch"):
            told = cli(command, root)
            assert told.status == 0 or told.refused, (place, command)
            ended[told.status] += 1
    assert ended[0] > 0 and ended[2] > 0
    assert len(places) > (50 if file == "metrics" else 5)


COLUMNS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "one less": lambda table: table.drop_columns(["text"]),
    "one more": lambda table: table.append_column("more", pa.nulls(table.num_rows)),
    "renamed": lambda table: table.rename_columns([f"{name}_" for name in table.column_names]),
    "texts as numbers": lambda table: table.set_column(2, "text", pa.array(range(table.num_rows))),
    "tokens as texts": lambda table: table.set_column(3, "token_ids", pa.array(["x"] * table.num_rows)),
}


@pytest.mark.parametrize("change", COLUMNS)
@pytest.mark.parametrize("reader", ["show", "compare"])
def test_other_columns_are_one_line(run: Path, tmp_path: Path, change: str, reader: str) -> None:
    """The records are made to agree: whoever sends a folder can do that."""
    from online_dpo.files import digest

    root = copied(run, tmp_path)
    for folder in root.glob("arms/*/seed_0/round_*"):
        file, record = folder / "held_out.parquet", folder / "stages" / "evaluate.json"
        table = COLUMNS[change](pq.read_table(file))
        file.unlink()
        pq.write_table(table, file)
        outputs = json.loads(record.read_text(encoding="utf-8"))["outputs"]
        edited_json(record, {"outputs": {**outputs, "held_out.parquet": digest(file)}})
    told = cli(reader, root)
    if reader == "show" or change == "renamed":
        assert "held_out.parquet" in told.refused
    assert told.status in (0, 2)


def test_a_file_that_is_no_parquet_is_one_line(run: Path, tmp_path: Path) -> None:
    root = copied(run, tmp_path)
    (root / "prompts.parquet").write_bytes(b"PAR1" + os.urandom(200) + b"PAR1")
    assert "prompts.parquet is missing or damaged" in cli("show", root).refused


def test_a_hand_edited_file_is_told_by_its_digest(run: Path, tmp_path: Path) -> None:
    root = copied(run, tmp_path)
    file = round_of(root) / "held_out.parquet"
    table = pq.read_table(file)
    file.unlink()
    pq.write_table(table.slice(1), file)
    assert "held_out.parquet was changed after stage 'evaluate' wrote it" in cli("compare", root).refused


def test_a_policy_of_pickles_is_no_policy(run: Path, tmp_path: Path) -> None:
    from online_dpo.policies import read_policy

    folder = round_of(copied(run, tmp_path)) / "policy"
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(RunFolderError, match=r"holds no \*\.safetensors weights"):
        read_policy(folder, verify=False)


def test_a_good_folder_is_read_without_a_word(run: Path, tmp_path: Path) -> None:
    assert refused(copied(run, tmp_path)) == []
    assert RunStore.open(run).round("on_policy", 0, 1).closed
