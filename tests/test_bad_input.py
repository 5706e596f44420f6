"""Bad input as a user gives it: some of each kind here, all of it by `make bad-input`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(1, str(Path(__file__).resolve().parent / "bad_input"))

import bad_input
import mutations
from case import Case
from runner import Ended, Outcome, run_case

from online_dpo.config import Experiment, load_experiment
from online_dpo.errors import OnlineDPOError

HERE = Path(__file__).resolve().parent / "bad_input"
SPREAD = (
    "yaml: tabs",
    "yaml: a bomb of aliases",
    "yaml: the same key twice",
    "keys: a misspelt key",
    "keys: one candidate",
    "usage: a misspelt command",
    "set: an unknown key",
    "command: run of a folder",
    "prompts: half a surrogate pair",
    "prompts: text from right to left",
    "model: truncated weights",
    "lora: a module that is not there",
    "tokenizer: no files",
    "dataset: two prompts in every row",
    "judge: a misspelt class",
    "gpu: one for the engine",
    "folder: a folder of other things, watched",
)


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps a copy of what it reads: not the user's."""
    monkeypatch.setitem(os.environ, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def named(name: str) -> Case:
    return next(case for case in bad_input.cases() if case.name == name)


@pytest.mark.parametrize("name", SPREAD)
def test_it_ends_in_one_line_and_nothing_is_lost(name: str) -> None:
    outcome = run_case(named(name))
    assert outcome.faults == (), outcome.line


def test_names_are_said_once_and_there_are_enough() -> None:
    names = [case.name for case in bad_input.cases()]
    assert len(set(names)) == len(names)
    refused = [case for case in bad_input.cases() if not (case.goes_on or case.may_go_on)]
    assert len(refused) >= 200


def test_the_page_names_cases_that_are_there() -> None:
    """Every case or kind that README's table names in backticks exists."""
    names = {case.name for case in bad_input.cases()}
    rows = [line for line in (HERE / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    told = [name for row in rows for name in row.split("`")[1::2]]
    assert len(told) > 60
    assert [name for name in told if name not in names] == []


# --- what counts as a fault ---


def ended(case: Case, status: int, err: str = "", out: str = "", change: str | None = None) -> tuple[str, ...]:
    """The faults of `case` where the command ends so, and changes the file `kept`."""

    def run(arguments: object, folder: Path) -> Ended:
        if change is not None:
            (folder / change).write_text("other", encoding="utf-8")
        return Ended(status, out, err)

    return run_case(case, run).faults


def kept(folder: Path) -> list[str]:
    (folder / "kept").write_text("mine", encoding="utf-8")
    return []


BAD = Case("x: y", kept, r"no file", exit_code=2)
LINE = "online-dpo: no file at kept\n"


def test_one_line_that_says_it_is_no_fault() -> None:
    assert ended(BAD, 2, LINE) == ()


@pytest.mark.parametrize(
    ("status", "err", "change", "fault"),
    [
        (0, "", None, "exit status 0, not 2"),
        (1, LINE, None, "exit status 1, not 2"),
        (2, "", None, "0 lines"),
        (2, LINE + LINE, None, "2 lines"),
        (2, "Traceback (most recent call last):\nKeyError\n", None, "a traceback"),
        (2, "no file\n", None, "does not say which program speaks"),
        (2, "online-dpo: wrong\n", None, "does not say 'no file'"),
        (2, "online-dpo: no file" + "x" * 700, None, "a line of 719 characters"),
        (2, "online-dpo: no file \x1b[2J", None, "control characters"),
        (2, LINE, "kept", "'kept' was changed"),
        (2, LINE, "more", "'more' was left behind"),
    ],
)
def test_whatever_else_it_ends_in_is_a_fault(status: int, err: str, change: str | None, fault: str) -> None:
    assert any(one.startswith(fault) for one in ended(BAD, status, err, change=change)), ended(BAD, status, err)


def test_an_odd_input_must_go_on() -> None:
    odd = Case("x: y", kept, r"done", goes_on=True)
    assert ended(odd, 0, out="done") == ()
    assert ended(odd, 2, LINE) == ("exit status 2",)
    assert ended(odd, 0, "a warning", "done") != ()
    assert ended(odd, 0, out="done", change="kept") == ("'kept' was changed",)


def test_the_last_line_counts_what_ended_well(capsys: pytest.CaptureFixture[str]) -> None:
    good, odd = Ended(2, "", LINE), Ended(0, "done", "")
    traced = Ended(1, "", "Traceback (most recent call last)")
    bad_input.sum_up(
        [
            Outcome(BAD, good, ()),
            Outcome(BAD, traced, ("a traceback",)),
            Outcome(Case("x: z", kept, "", goes_on=True), odd, ()),
        ]
    )
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "1 odd inputs went on",
        "2 inputs, 1 one-line errors, 1 tracebacks",
    ]


# --- chance ---


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("mutated") / "experiment.yaml"


def test_what_is_changed_is_right(file: Path) -> None:
    """Otherwise every change of it would be refused for the same reason."""
    file.write_text(yaml.safe_dump(mutations.RIGHT, sort_keys=False), encoding="utf-8")
    assert list(load_experiment(file).arms) == list(mutations.RIGHT["arms"])


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False))
def test_a_changed_experiment_is_right_or_one_line(file: Path, random: Random) -> None:
    text = mutations.mutated(mutations.RIGHT, random)
    file.write_bytes(text)
    try:
        experiment = load_experiment(file)
    except OnlineDPOError as error:
        message = str(error)
        assert message and len(message.splitlines()) == 1 and len(message) < 600, message
    else:
        assert isinstance(experiment, Experiment)
    assert file.read_bytes() == text


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_bytes_of_noise_are_one_line(file: Path, noise: bytes) -> None:
    file.write_bytes(noise)
    with pytest.raises(OnlineDPOError) as error:
        load_experiment(file)
    assert len(str(error.value).splitlines()) == 1
