"""What a reader gets of an audit: the table, the Markdown row, the figure, and the command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from rich.console import Console
from test_audit import PAIRS, TABLE, Says, Scores, asked, both, item, pair, wins
from typer.testing import CliRunner, Result

from online_dpo.audit.auditing import Audit, audit_candidates, audit_labelled
from online_dpo.audit.display import audit_table, markdown_header, markdown_row, notes
from online_dpo.audit.figures import draw_audit
from online_dpo.commands.judge_audit import judge_audit
from online_dpo.judging import Abstention

app = typer.Typer()
app.command("audit")(judge_audit)


@app.callback()
def _group() -> None:
    """Makes `audit` a subcommand, as the project's own command line has it."""


def labelled() -> Audit:
    scores = {"aaaa": 2.0, "bb": 1.0, "c": 0.0, "ddd": 5.0, "e": 0.0, "fff": 1.0, "g": 3.0, "h": 3.0, "i": 1.0}
    return audit_labelled(asked(Says(TABLE)), PAIRS, against=asked(Scores(scores), "other"), source="five.jsonl")


def candidates() -> Audit:
    table = wins("a>b", "b>c", "c>a")
    return audit_candidates(asked(Says(table)), [item("p", "a", "b", "c"), item("q", "a", "b")])


def shown(audit: Audit) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100, highlight=False).print(audit_table(audit))
    return stream.getvalue()


# --- table ---


def test_table_fits_and_holds_the_figures() -> None:
    text = shown(labelled())
    assert max(len(line) for line in text.splitlines()) <= 100
    lines = {line[:24].strip(): line[24:] for line in text.splitlines()}
    assert "62.5 [" in lines["accuracy"]
    assert "25.0 [" in lines["flips"]
    assert "+25.0 [" in lines["judge − longer"]
    assert "0.209 [" in lines["Brier score"]
    assert "0.619 [" in lines["Cohen's κ"]
    assert "abstained: busy (1)" in text


def test_table_of_candidates_has_no_labels() -> None:
    text = shown(candidates())
    assert "accuracy" not in text
    assert "intransitive triples" in text
    assert "33.3" not in text.split("longest ranked first")[0]


def test_hostile_reason_reaches_no_terminal() -> None:
    reason = "\x1b[31mred\x1b]0;title\x07 [bold]loud[/bold]"
    table = {**TABLE, **both("i", "j", Abstention(reason), Abstention(reason))}
    text = shown(audit_labelled(asked(Says(table)), PAIRS))
    assert "\x1b" not in text
    assert "[bold]loud[/bold]" in text


def test_notes_tell_of_a_judge_that_sees_no_difference() -> None:
    same = audit_labelled(
        asked(Scores(dict.fromkeys("cegi", 1.0) | dict.fromkeys(("ddd", "fff", "h", "j"), 1.0))), PAIRS
    )
    assert any("every pair is a tie" in note and "unit=words" in note for note in notes(same))
    assert not any("tie" in note for note in notes(labelled()))
    assert any("abstained on every pair" in note for note in notes(audit_labelled(asked(Scores({})), PAIRS)))


def test_markdown_rows_have_the_headers_columns() -> None:
    header = markdown_header().splitlines()
    for audit in (labelled(), candidates()):
        row = markdown_row(audit)
        assert row.count("|") == header[0].count("|") == header[1].count("|")
    cells = dict(
        zip(
            *([cell.strip() for cell in line.split("|")] for line in (header[0], markdown_row(labelled()))), strict=True
        )
    )
    assert cells["accuracy %"].startswith("62.5 [")
    assert cells["flips %"].startswith("25.0 [")
    assert cells["intransitive %"] == "–"


def test_a_bar_in_a_name_does_not_break_the_markdown_table() -> None:
    row = markdown_row(audit_labelled(asked(Says(TABLE), "a|b"), PAIRS))
    assert row.startswith("| a\\|b |")


# --- figure ---


@pytest.mark.parametrize("make", [labelled, candidates])
def test_figure_is_drawn_and_the_same_every_time(make: object, tmp_path: Path) -> None:
    assert callable(make)
    audit = make()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert [file.name for file in draw_audit(audit, tmp_path / name)] == ["audit.png", "audit.svg"]
    png, svg = (tmp_path / "one" / f"audit.{kind}" for kind in ("png", "svg"))
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_bytes() == (tmp_path / "two" / "audit.svg").read_bytes()
    words = "".join(ElementTree.parse(svg).getroot().itertext())  # noqa: S314 - of our own
    assert "Does length sway it?" in words
    assert ("Calibration" in words) == (audit.accuracy is not None)


def test_figure_takes_any_name_and_an_audit_without_a_verdict(tmp_path: Path) -> None:
    """A lone dollar, or mathematics that is none, must not stop the drawing; nor must nothing to draw."""
    draw_audit(audit_labelled(asked(Scores({}), "cost $\\frac{ \x1b[31m $ " + "long " * 80), PAIRS), tmp_path)
    assert "\x1b" not in (tmp_path / "audit.svg").read_text(encoding="utf-8")


# --- command ---


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["audit", *map(str, words)])


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    rows = [{"prompt": f"q{n % 3}", "chosen": "word " * (n + 2), "rejected": "word " * (9 - n)} for n in range(8)]
    file = tmp_path / "some.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_command_prints_and_writes_the_audit(pairs_file: Path, tmp_path: Path) -> None:
    """Of 8 pairs n + 2 words against 9 − n: the chosen is longer for n ≥ 4: accuracy ½."""
    done = run(
        "--judge", "judges.length:LengthJudge", "--set", "unit=words", "--pairs", pairs_file, "-o", tmp_path / "out"
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Audit of judges.length:LengthJudge (unit=words) on some.jsonl" in done.output
    assert "50.0 [" in done.output
    found = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert (found["accuracy"]["mean"], found["pairs"], found["prompts"], found["format"]) == (0.5, 8, 3, 1)
    assert "points" not in found
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"audit.json", "audit.png", "audit.svg"}


def test_command_tells_of_a_judge_that_counts_tokens(pairs_file: Path) -> None:
    done = run("--judge", "judges.length:LengthJudge", "--pairs", pairs_file)
    assert done.exit_code == 0
    assert "every pair is a tie" in " ".join(done.output.split())


def test_command_reads_judges_from_yaml_files_and_makes_markdown_rows(pairs_file: Path, tmp_path: Path) -> None:
    judge, experiment = tmp_path / "judge.yaml", tmp_path / "experiment.yaml"
    judge.write_text("use: beside:Mine\ntop: 3\n", encoding="utf-8")
    experiment.write_text("name: x\njudge: judges.sentiment:SentimentJudge\n", encoding="utf-8")
    (tmp_path / "beside.py").write_text(
        "class Mine:\n    def __init__(self, top):\n        self.top = top\n"
        "    def score(self, prompt, candidates):\n        return [min(self.top, len(c.text)) for c in candidates]\n",
        encoding="utf-8",
    )
    other = tmp_path / "more.jsonl"
    other.write_text(pairs_file.read_text(encoding="utf-8"), encoding="utf-8")
    done = run(
        "--judge", judge, "--set", "top=4", "--against", experiment, "--pairs", pairs_file, "--pairs", other,
        "--markdown", "-o", tmp_path / "out", "--cache", tmp_path / "verdicts.sqlite", "--limit", 5, "--quiet",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[:2] == markdown_header().splitlines()
    assert [line.split("|")[1:4] for line in lines[2:]] == [
        [" beside:Mine (top=4) ", " some.jsonl ", " 5 "],
        [" beside:Mine (top=4) ", " more.jsonl ", " 5 "],
    ]
    assert (tmp_path / "out" / "some" / "audit.png").is_file()
    assert (tmp_path / "out" / "more" / "audit.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge", "judges.length:LengthJudge", "--set", "unt=words"], "unknown key 'unt' (did you mean 'unit'?)"),
        (["--judge", "judges.length:LenghtJudge"], "did you mean 'LengthJudge'?"),
        (["--judge", "LengthJudge"], 'a judge is named as "module:Class"'),
        (["--judge", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_command_tells_what_is_wrong_in_one_line(words: list[str], message: str, pairs_file: Path) -> None:
    done = run(*words, "--pairs", pairs_file)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_two_files_of_one_name_do_not_overwrite_each_other(pairs_file: Path, tmp_path: Path) -> None:
    done = run(
        "--judge", "judges.length:LengthJudge", "--pairs", pairs_file, "--pairs", pairs_file, "-o", tmp_path / "out"
    )  # fmt: skip
    assert done.exit_code == 2
    assert "two --pairs files are called 'some'" in done.stderr


def test_judge_that_asks_the_policy_cannot_be_audited_alone(pairs_file: Path, tmp_path: Path) -> None:
    (tmp_path / "asker.py").write_text(
        "from online_dpo.judging import PointwiseJudge\n"
        "class Asker(PointwiseJudge):\n    uses_policy = True\n"
        "    def attach(self, model): pass\n"
        "    def score(self, prompt, candidates): return [1.0 for c in candidates]\n",
        encoding="utf-8",
    )
    (tmp_path / "asker.yaml").write_text("use: asker:Asker\n", encoding="utf-8")
    done = run("--judge", tmp_path / "asker.yaml", "--pairs", pairs_file)
    assert done.exit_code == 2
    assert "asks the policy of a round" in done.stderr


def test_repeated_prompts_are_one_cluster() -> None:
    pairs = [pair(str(n), f"a{n}", f"bb{n}", "the same") for n in range(4)]
    assert (
        audit_labelled(
            asked(Scores({f"a{n}": 1.0 for n in range(4)} | {f"bb{n}": 0.0 for n in range(4)})), pairs
        ).prompts
        == 1
    )
