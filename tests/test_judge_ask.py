"""A person at a run's answers: what is asked and in which order, what is kept, and the terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from online_dpo.asking_people import (
    MOST_SHOWN,
    Choice,
    Question,
    Sitting,
    gather,
    open_answers,
    readable,
    take_sample,
)
from online_dpo.commands.judge_ask import judge_ask, parse_order
from online_dpo.config import JudgeSpec, validate_experiment
from online_dpo.errors import ConfigError, RunFolderError
from online_dpo.judging import judge_all, load_judge
from online_dpo.judging.people import read_people
from online_dpo.records import HeldOutAnswer, write_candidates, write_held_out, write_prompts
from online_dpo.store import RoundFolder, RunStore
from online_dpo.types import Candidate, Message, Prompt, Verdict

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
Texts = Mapping[str, Sequence[str]]
"""Prompt id -> its answers."""


class Made:
    """A run folder with the stages that a test asks for, written through the store."""

    def __init__(self, root: Path, prompts: int = 4) -> None:
        names = [f"p{number}" for number in range(prompts)]
        self.prompts = {name: Prompt(name, (Message("user", f"Question {name}?"),), (1, 2)) for name in [*names, "h0"]}
        spec = {
            "name": "made",
            "model": "none",
            "seeds": [0, 1],
            "prompts": {"path": "none"},
            "judge": {"use": "judges.length:LengthJudge"},
            "rounds": 2,
            "arms": {"zebra": {}, "okapi": {}},
        }
        root.mkdir()
        train = [self.prompts[name] for name in names]
        write_prompts(root / "prompts.parquet", {"train": train, "held_out": [self.prompts["h0"]]})
        self.store = RunStore.create(root, validate_experiment(spec, "spec"), {"folder": str(root)})

    def sampled(self, texts: Texts, arm: str = "zebra", index: int = 1, seed: int = 0) -> RoundFolder:
        """`sample` of a round done, with these answers."""
        candidates = [answer(name, i, text) for name, row in texts.items() for i, text in enumerate(row)]
        folder = self.store.round(arm, seed, index)

        def produce(out: Path) -> dict[str, Any]:
            write_candidates(out / "candidates.parquet", candidates)
            return {}

        folder.stage("sample", {"at": f"{arm}/{seed}/{index}"}, ["candidates.parquet"], produce)
        return folder

    def measured(self, text: str, arm: str, index: int, seed: int = 0) -> None:
        """`evaluate` of a round done, with this held-out answer."""

        def produce(out: Path) -> dict[str, Any]:
            rows = [HeldOutAnswer(answer("h0", 0, text), score=1.0, abstain_reason=None, initial_logprobs=(-0.5,))]
            write_held_out(out / "held_out.parquet", rows)
            return {}

        inputs = {"at": f"{arm}/{seed}/{index}"}
        self.store.round(arm, seed, index).stage("evaluate", inputs, ["held_out.parquet"], produce)

    def ask(self, typed: str, *arguments: object, name: str = "ann") -> Result:
        """The command, with what the person types."""
        app = typer.Typer()
        app.command()(judge_ask)
        everything = [self.store.root, "--name", name, *arguments]
        return CliRunner().invoke(app, [str(one) for one in everything], input=typed)

    @property
    def file(self) -> Path:
        return self.store.root / "human" / "ann.jsonl"


def answer(prompt_id: str, index: int, text: str) -> Candidate:
    return Candidate(prompt_id, index, text, (7,), (-0.5,), "stop", index)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "run")


def of(question: Question) -> set[str]:
    return set(question.texts)


# --- what is asked ---


def test_every_prompt_with_its_answers_is_a_question(made: Made) -> None:
    made.sampled({"p0": ["x", "y"], "p1": ["u", "v", "w"]})
    questions, alike = gather(made.store, Choice(), "ann")
    assert alike == 0
    assert {(q.prompt_id, frozenset(of(q))) for q in questions} == {("p0", frozenset("xy")), ("p1", frozenset("uvw"))}
    assert all(q.messages == made.prompts[q.prompt_id].messages for q in questions)


def test_the_same_answers_in_two_arms_are_asked_once(made: Made) -> None:
    made.sampled({"p0": ["x", "y"], "p1": ["u", "v"]}, "zebra")
    made.sampled({"p0": ["y", "x", "x"], "p1": ["u", "other"]}, "okapi")
    questions, _ = gather(made.store, Choice(), "ann")
    assert sorted(sorted(of(q)) for q in questions) == [["other", "u"], ["u", "v"], ["x", "y"]]


def test_a_choice_of_arm_seed_and_round(made: Made) -> None:
    for arm in ("zebra", "okapi"):
        for seed in (0, 1):
            for index in (1, 2):
                made.sampled({"p0": [f"{arm}{seed}{index}", "x"]}, arm, index, seed)
    found = {next(iter(of(q) - {"x"})) for q in gather(made.store, Choice(arm="okapi", seed=1), "ann")[0]}
    assert found == {"okapi11", "okapi12"}
    found = {next(iter(of(q) - {"x"})) for q in gather(made.store, Choice(seed=0, round=2), "ann")[0]}
    assert found == {"zebra02", "okapi02"}


def test_order_is_random_the_same_again_and_another_for_another_person(tmp_path: Path) -> None:
    names = [f"p{number}" for number in range(40)]
    made = Made(tmp_path / "run", prompts=40)
    made.sampled({name: ["x", "y", "z"] for name in names})
    ann, again, bob = (gather(made.store, Choice(), person)[0] for person in ("ann", "ann", "bob"))
    assert ann == again
    assert sorted(q.id for q in ann) == sorted(q.id for q in bob)
    assert [q.id for q in ann] != [q.id for q in bob]
    assert [q.prompt_id for q in ann] != names
    # Each text stands first in a third of the questions: 13 of 40, give or take 3 standard deviations of 3.
    for text in "xyz":
        assert 4 <= sum(q.texts[0] == text for q in ann) <= 22


def test_a_sample_is_the_same_for_everybody(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", prompts=12)
    made.sampled({f"p{number}": ["x", "y"] for number in range(12)})
    ann, bob = (take_sample(gather(made.store, Choice(), person)[0], 5) for person in ("ann", "bob"))
    assert len(ann) == 5
    assert {q.id for q in ann} == {q.id for q in bob}
    assert len(take_sample(ann, 50)) == len(take_sample(ann, None)) == 5


def test_answers_that_look_the_same_are_shown_once_and_tie(made: Made) -> None:
    made.sampled({"p0": ["same", "same \n", "\x1b[1msame", "other"], "p1": ["x", "x", "\tx"]})
    [question], alike = gather(made.store, Choice(), "ann")
    assert alike == 1
    assert len(question.texts) == 4
    assert sorted(len(group) for group in question.seen) == [1, 3]
    with open_answers(made.store.root, "ann") as file:
        sitting = Sitting([question], file)
        other = next(place for place, group in enumerate(question.seen) if len(group) == 1)
        sitting.rank(question, ((other,), (1 - other,)), 1.0)
    [kept] = read_people(made.file).values()
    assert kept.ranking is not None
    assert [sorted(kept.texts[place] for place in group) for group in kept.ranking] == [
        ["other"],
        ["\x1b[1msame", "same", "same \n"],
    ]


def test_of_very_many_answers_some_are_drawn(made: Made) -> None:
    texts = [f"answer {number}" for number in range(60)]
    made.sampled({"p0": texts})
    [question], _ = gather(made.store, Choice(), "ann")
    [bobs], _ = gather(made.store, Choice(), "bob")
    assert len(question.texts) == MOST_SHOWN
    assert of(question) == of(bobs)
    assert of(question) < set(texts)


def test_a_stage_that_is_not_finished_is_not_read(made: Made) -> None:
    made.sampled({"p0": ["x", "y"]})
    folder = made.sampled({"p1": ["u", "v"]}, index=2)
    (folder.path / "stages" / "sample.json").unlink()
    questions, _ = gather(RunStore.open(made.store.root), Choice(), "ann")
    assert [q.prompt_id for q in questions] == ["p0"]


def test_answers_that_were_changed_are_refused(made: Made) -> None:
    folder = made.sampled({"p0": ["x", "y"]})
    write_candidates(folder.path / "candidates.parquet", [answer("p0", 0, "x"), answer("p0", 1, "forged")])
    with pytest.raises(RunFolderError, match="was changed after stage 'sample'"):
        gather(RunStore.open(made.store.root), Choice(), "ann")


def test_held_out_answers_stand_beside_the_initial_policys(made: Made) -> None:
    for arm in ("zebra", "okapi"):
        made.measured("initial", arm, 0)
        made.measured(f"{arm} one", arm, 1)
    made.measured("zebra two", "zebra", 2)
    [question], _ = gather(made.store, Choice("held_out"), "ann")
    assert of(question) == {"initial", "zebra two", "okapi one"}
    assert question.prompt_id == "h0"
    [question], _ = gather(made.store, Choice("held_out", arm="zebra", round=1), "ann")
    assert of(question) == {"initial", "zebra one"}
    [question], _ = gather(made.store, Choice("held_out", round=2, against=1), "ann")
    assert of(question) == {"zebra one", "zebra two"}


def test_held_out_answers_of_two_seeds_are_not_mixed(made: Made) -> None:
    for seed in (0, 1):
        made.measured(f"initial {seed}", "zebra", 0, seed)
        made.measured(f"one {seed}", "zebra", 1, seed)
    questions, _ = gather(made.store, Choice("held_out"), "ann")
    assert sorted(sorted(of(q)) for q in questions) == [["initial 0", "one 0"], ["initial 1", "one 1"]]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(arm="zebr"), "no arm 'zebr' (did you mean 'zebra'?); arms: zebra, okapi"),
        (Choice(seed=7), "no seed 7; seeds: 0, 1"),
        (Choice("held_out", round=1, against=1), "round 1 cannot be held against itself"),
    ],
)
def test_a_choice_that_cannot_be(made: Made, choice: Choice, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        gather(made.store, choice, "ann")


def test_nothing_to_ask_about_yet(made: Made) -> None:
    with pytest.raises(RunFolderError, match="no answers were sampled yet in any round"):
        gather(made.store, Choice(), "ann")
    made.sampled({"p0": ["x", "x"], "p1": ["y"]})
    with pytest.raises(RunFolderError, match="nothing to rank: all answers to a prompt look the same"):
        gather(made.store, Choice(), "ann")
    made.measured("initial", "zebra", 0)
    with pytest.raises(RunFolderError, match="a trained round and round 0 of what was chosen have no held-out answers"):
        gather(made.store, Choice("held_out"), "ann")


def test_readable_keeps_lines_and_indent_and_nothing_that_acts() -> None:
    text = "\n\nif x:\r\n\treturn\n\n\n\n\x1b]0;title\x07end\u202e\x00" + "\n" + " " * 500 + "far"
    assert readable(text) == "if x:\n    return\n\nend\n" + " " * 16 + "far"


# --- what is kept ---


def test_an_answer_is_on_the_disk_before_the_call_returns(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made.sampled({"p0": ["x", "y"]})
    [question], _ = gather(made.store, Choice(), "ann")
    synced: list[bytes] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        real(handle)
        file = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if file.is_file():
            synced.append(file.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    with open_answers(made.store.root, "ann") as file:
        Sitting([question], file).rank(question, ((0,), (1,)), 1.0)
        assert synced == [made.file.read_bytes()]
        assert synced[0].endswith(b"\n")


def test_a_half_written_line_is_cut_off_before_the_next(made: Made) -> None:
    made.sampled({"p0": ["x", "y"], "p1": ["u", "v"]})
    made.ask("a\nq\n")
    whole = made.file.read_bytes()
    made.file.write_bytes(whole + whole[: len(whole) // 2])
    assert "2 of 2" in made.ask("b\n").stdout
    assert made.file.read_bytes().startswith(whole)
    assert len(read_people(made.file)) == 2


def test_a_file_that_is_damaged_is_refused_and_left_alone(made: Made) -> None:
    made.sampled({"p0": ["x", "y"]})
    made.file.parent.mkdir()
    made.file.write_text("{}\nmore\n", encoding="utf-8")
    result = made.ask("a\n")
    assert result.exit_code == 2
    assert "ann.jsonl, line 1 is no answer of a person" in result.stderr
    assert made.file.read_text(encoding="utf-8") == "{}\nmore\n"


def test_two_sessions_of_one_name_do_not_interleave(made: Made) -> None:
    made.sampled({"p0": ["x", "y"]})
    with open_answers(made.store.root, "ann"):
        result = made.ask("a\n")
        assert (result.exit_code, result.stderr) == (
            2,
            "online-dpo: somebody is answering as 'ann' already; choose another --name\n",
        )
        assert made.ask("a\n", name="bob").exit_code == 0
    assert made.ask("a\n").exit_code == 0
    assert {path.name for path in made.file.parent.iterdir()} == {"ann.jsonl", "bob.jsonl"}


def test_a_run_that_is_at_work_can_be_asked_about(made: Made) -> None:
    made.sampled({"p0": ["x", "y"]})
    with made.store.locked():
        assert made.ask("a\n").exit_code == 0
    assert len(read_people(made.file)) == 1


# --- what is typed ---


@pytest.mark.parametrize(
    ("typed", "count", "order"),
    [
        ("a", 2, ((0,), (1,))),
        ("B", 2, ((1,), (0,))),
        ("=", 2, ((0, 1),)),
        ("a=b", 2, ((0, 1),)),
        ("b>a", 2, ((1,), (0,))),
        ("b > a = c", 3, ((1,), (0, 2))),
        ("  C=A>B ", 3, ((0, 2), (1,))),
        ("=", 3, ((0, 1, 2),)),
        ("d>c>b>a", 4, ((3,), (2,), (1,), (0,))),
    ],
)
def test_orders(typed: str, count: int, order: tuple[tuple[int, ...], ...]) -> None:
    assert parse_order(typed, count) == order


@pytest.mark.parametrize(
    ("typed", "count", "message"),
    [
        ("", 2, "type a, b or = (? for help)"),
        ("c", 2, "there is no answer c; type a, b or ="),
        ("ab", 2, "type a, b or ="),
        ("a < b", 2, "type a, b or ="),
        ("a", 3, "b and c are missing; type an order of a, b and c, as in b > a = c"),
        ("a > b", 3, "c is missing"),
        ("a > b > a > c", 3, "a stands there twice"),
        ("a >", 3, "type an order of a, b and c"),
        ("> a", 3, "type an order"),
        ("a > d > b > c", 3, "there is no answer d"),
        ("a > b > c", 4, "d is missing; type an order of a, b, c and d, as in b > a = c > d"),
    ],
)
def test_what_is_no_order_is_told(typed: str, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_order(typed, count)


@settings(deadline=None)
@given(st.text(alphabet="abcd>= =sé1", max_size=12) | st.text(max_size=8), st.integers(2, MOST_SHOWN))
def test_any_line_is_a_whole_order_or_told(typed: str, count: int) -> None:
    try:
        order = parse_order(typed, count)
    except ValueError as error:
        assert str(error)
    else:
        assert sorted(place for group in order for place in group) == list(range(count))


def test_the_letters_of_answers_are_no_commands() -> None:
    assert not set("abcdefghijklmnopqrstuvwxyz"[:MOST_SHOWN]) & set("squ")


# --- the terminal ---


def test_a_whole_sitting(made: Made) -> None:
    made.sampled({"p0": ["x", "y"], "p1": ["u", "v", "w"], "p2": ["one", "two"]})
    questions, _ = gather(made.store, Choice(), "ann")
    typed = {2: "b", 3: "c > a = b"}
    lines = [typed[len(q.texts)] for q in questions]
    result = made.ask("\n".join(lines) + "\n")
    assert result.exit_code == 0, result.stderr
    for part in ("1 of 3", "2 of 3", "3 of 3", "all 3 prompts done; kept in", "judges.human:HumanJudge"):
        assert part in result.stdout
    found = read_people(made.file)
    assert [found[q.id].ranking for q in questions] == [
        ((1,), (0,)) if len(q.texts) == 2 else ((2,), (0, 1)) for q in questions
    ]
    assert [found[q.id].texts for q in questions] == [q.texts for q in questions]


def test_blind(made: Made) -> None:
    made.sampled({"p0": ["x", "y"]}, "zebra")
    made.sampled({"p1": ["u", "v"]}, "okapi", index=2, seed=1)
    shown = made.ask("a\na\n").stdout
    assert "Question p0?" in shown
    for secret in ("zebra", "okapi", "seed", "round", "LengthJudge", "score"):
        assert secret not in shown


def test_quit_and_go_on(made: Made) -> None:
    made.sampled({"p0": ["x", "y"], "p1": ["u", "v"], "p2": ["one", "two"]})
    first = made.ask("a\nq\n")
    assert "1 of 3 prompts done" in first.stdout
    assert "the same command goes on" in first.stdout
    before = made.file.read_bytes()
    ended = made.ask("")  # the end of the input is "quit"
    assert ended.exit_code == 0
    assert "2 of 3" in ended.stdout
    assert made.file.read_bytes() == before
    assert "all 3 prompts done" in made.ask("b\nb\n").stdout
    assert "1 of" not in made.ask("").stdout


def test_undo_asks_again_also_after_a_restart_and_after_the_last(made: Made) -> None:
    made.sampled({"p0": ["x", "y"], "p1": ["u", "v"]})
    questions, _ = gather(made.store, Choice(), "ann")
    made.ask("a\n")
    result = made.ask("u\nb\nb\nu\na\n")
    assert result.stdout.count("1 of 2") == 1
    assert result.stdout.count("2 of 2") == 3
    found = read_people(made.file)
    assert [found[q.id].ranking for q in questions] == [((1,), (0,)), ((0,), (1,))]
    empty = made.ask("u\n", name="bob")
    assert "there is nothing to undo" in empty.stdout


def test_skipping_with_and_without_a_reason(made: Made) -> None:
    made.sampled({"p0": ["x", "y"], "p1": ["u", "v"]})
    result = made.ask("s\ns both are \x1b[2Jin French\n")
    assert "all 2 prompts done, 2 of them skipped" in result.stdout
    assert "HumanJudge" not in result.stdout
    found = list(read_people(made.file).values())
    assert [(answer.ranking, answer.reason) for answer in found] == [(None, ""), (None, "both are in French")]


def test_wrong_input_asks_again_and_keeps_nothing(made: Made) -> None:
    made.sampled({"p0": ["x", "y"]})
    result = made.ask("nonsense\n\n?\nc\n\x1b[A\nq\n")
    assert result.stdout.count("type a, b or =") >= 4
    assert "Type the letters, best first" in result.stdout
    assert made.file.read_bytes() == b""


def test_hostile_texts_reach_the_screen_as_text(made: Made) -> None:
    made.sampled({"p0": ["\x1b[2J\x1b]0;pwned\x07[red]red[/red] [/] \u202eevil", "\x9b31mplain\r> q"]})
    result = made.ask("?\na\n")
    assert result.exit_code == 0
    assert not CONTROL.search(result.stdout)
    assert "[red]red[/red] [/] evil" in result.stdout
    assert (
        "\x1b"
        in json.loads(made.file.read_text(encoding="utf-8"))["texts"][0]
        + json.loads(made.file.read_text(encoding="utf-8"))["texts"][1]
    )


def test_an_empty_answer_can_be_seen(made: Made) -> None:
    made.sampled({"p0": ["", "y"]})
    assert "(empty)" in made.ask("a\n").stdout


def test_all_that_a_conversation_said_is_shown(made: Made) -> None:
    chat = (Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi"), Message("user", "Go"))
    write_prompts(made.store.root / "prompts.parquet", {"train": [Prompt("p0", chat, (1,))], "held_out": []})
    made.sampled({"p0": ["x", "y"]})
    shown = made.ask("q\n").stdout
    assert re.search(r"system +Be brief\.[\s\S]*user +Hello[\s\S]*assistant +Hi[\s\S]*user +Go", shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "zebr"], "did you mean 'zebra'?"),
        (["--name", "../up"], "--name ../up: letters, digits"),
        (["--name", "a\x1b[2J"], "--name a: letters, digits"),
        (["--round", "1", "--stage", "held_out", "--against", "1"], "cannot be held against itself"),
    ],
)
def test_bad_options_are_one_line(made: Made, arguments: list[str], message: str) -> None:
    made.sampled({"p0": ["x", "y"]})
    result = made.ask("a\n", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not made.file.parent.exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(judge_ask)
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert (result.exit_code, result.stderr) == (
        2,
        f"online-dpo: {tmp_path} is no run folder (no manifest.json in it)\n",
    )


def test_what_a_person_said_is_a_judge(made: Made) -> None:
    made.sampled({"p0": ["x", "y", "z"]})
    [question], _ = gather(made.store, Choice(), "ann")
    made.ask("b > a = c\n")
    spec = JudgeSpec.model_validate({"use": "judges.human:HumanJudge", "answers": "human/ann.jsonl"})
    judge = load_judge(spec, [made.store.root])
    candidates = [answer("p0", place, text) for place, text in enumerate(question.texts)]
    verdicts = judge_all(judge, made.prompts, candidates, max_abstain=0.0)
    assert verdicts == [Verdict("p0", i, score, {"people": 1}) for i, score in enumerate([0.25, 1.0, 0.25])]


# --- a real terminal ---


class Terminal:
    """The command in a process of its own, on a pseudo-terminal."""

    def __init__(self, run: Path) -> None:
        self.master, slave = pty.openpty()
        code = "import typer; from online_dpo.commands.judge_ask import judge_ask; typer.run(judge_ask)"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(run), "--name", "ann"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read until `text` is on the screen, once more than before."""
        limit = time.monotonic() + seconds
        begin = len(self.seen)
        while text not in self.seen[begin:]:
            ready, _, _ = select.select([self.master], [], [], max(0.0, limit - time.monotonic()))
            assert ready, f"waited for {text!r}: {self.seen}"
            try:
                data = os.read(self.master, 4096)
            except OSError:  # the other side is closed
                data = b""
            assert data, f"ended before {text!r}: {self.seen}"
            self.seen += data.decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_a_kill_loses_nothing_that_was_answered(made: Made) -> None:
    made.sampled({"p0": ["x", "y"], "p1": ["u", "v"]})
    terminal = Terminal(made.store.root)
    try:
        terminal.wait_for("> ")
        terminal.type("a\n")
        terminal.wait_for("2 of 2")
        os.kill(terminal.process.pid, signal.SIGKILL)
        terminal.process.wait()
    finally:
        terminal.close()
    assert len(read_people(made.file)) == 1
    terminal = Terminal(made.store.root)
    try:
        terminal.wait_for("2 of 2")
        assert "1 of 2" not in terminal.seen
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.wait_for("1 of 2 prompts done")
        assert terminal.process.wait(30) == 130
    finally:
        terminal.close()
