"""The command line: one line and exit code 2 for what the person got wrong, 1 for what went wrong, 130 for Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from fakes import FakeEngine, FakeLearner
from typer.testing import CliRunner, Result

import online_dpo
from online_dpo.backends import factory
from online_dpo.cli import app
from online_dpo.config import JudgeSpec, SamplingSpec
from online_dpo.errors import ConfigError, EngineError
from online_dpo.judging import Judge, load_judge
from online_dpo.protocols import SampleRequest
from online_dpo.store import RunStore
from online_dpo.types import Candidate, Prompt

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(autouse=True)
def kept_signals() -> Iterator[None]:
    """`run` takes over SIGTERM; these tests share a process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def here(spec: JudgeSpec, folders: Sequence[Path]) -> Judge:
    """A judge that wants a process of its own gets none in these tests."""
    return load_judge(spec, folders)


class Desk:
    """A folder with an experiment, its prompts, and a command line whose engine and learner are fakes."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.calls: list[tuple[Any, ...]] = []
        self.engine: Callable[[list[tuple[Any, ...]]], FakeEngine] = FakeEngine
        self.learner: Callable[[list[tuple[Any, ...]]], FakeLearner] = FakeLearner
        self.spec: dict[str, Any] = {
            "name": "tiny",
            "model": str(model),
            "prompts": {"path": "prompts.jsonl", "per_round": 3, "held_out": 4},
            "sampling": {"n": 3, "max_tokens": 8},
            "judge": {"use": "judges.length:LengthJudge", "unit": "characters"},
            "dpo": {"batch_size": 2},
            "rounds": 2,
            "arms": {"on_policy": {}, "self_offline": {"source": "initial"}},
            "output": str(folder / "runs"),
        }
        rows = [json.dumps({"prompt": f"Tell me of number {i}."}) for i in range(12)]
        (folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
        session = SimpleNamespace(end_sets=lambda: None)
        monkeypatch.setattr(factory, "ray_session", lambda _: nullcontext(session))
        monkeypatch.setattr(factory, "start_set", self._backends)

    @contextmanager
    def _backends(self, *_: Any, **__: Any) -> Iterator[factory.Backends]:
        yield factory.Backends(self.engine(self.calls), self.learner(self.calls), here)

    @property
    def file(self) -> Path:
        return self.folder / "experiment.yaml"

    @property
    def root(self) -> Path:
        return self.folder / "runs" / "tiny"

    def write(self, **changes: Any) -> Path:
        self.file.write_text(yaml.safe_dump(self.spec | changes), encoding="utf-8")
        return self.file

    def __call__(self, *arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def desk(tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    made = Desk(tmp_path, small_model, monkeypatch)
    made.write()
    return made


def one_line(result: Result, code: int = 2) -> str:
    """The error: one line on stderr, nothing else, the exit code."""
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("online-dpo: ")
    assert "Traceback" not in result.stdout
    return lines[0].removeprefix("online-dpo: ")


# --- bad input ---

BAD = [
    ({"betta": 1}, "unknown key 'betta'"),
    ({"dpo": {"betta": 0.1}}, "unknown key 'dpo.betta' (did you mean 'beta'?)"),
    ({"dpo": {"beta": "much"}}, "dpo.beta: "),
    ({"rounds": 0}, "rounds: "),
    ({"seeds": []}, "seeds: "),
    ({"name": "../up"}, "name: letters, digits"),
    ({"arms": {"on": {"sorce": "initial"}}}, "unknown key 'arms.on.sorce' (did you mean 'source'?)"),
    ({"arms": {"on": {"dpo": {"batchsize": 2}}}}, "unknown key 'arms.on.dpo.batchsize' (did you mean 'batch_size'?)"),
    ({"arms": {"../../x": {}}}, "arms.../../x: letters, digits"),
    ({"prompts": {"path": "promts.jsonl"}}, "no prompts at 'promts.jsonl' (did you mean 'prompts.jsonl'?)"),
    ({"prompts": {"path": "prompts.jsonl", "column": "prmpt"}}, "no column 'prmpt' (did you mean 'prompt'?)"),
    ({"prompts": {"path": "prompts.jsonl", "per_round": 3, "held_out": 12}}, "at least 13 are needed"),
    ({"prompts": {"path": "prompts.jsonl", "per_round": 9, "held_out": 4}}, "prompts.per_round is 9"),
    ({"model": "smollm2-135m-instrct"}, "no model 'smollm2-135m-instrct' (did you mean 'smollm2-135m-instruct'?)"),
    ({"model": "/no/such/folder"}, "no model '/no/such/folder'"),
    ({"judge": {"use": "judges.lenght:LengthJudge"}}, "no module 'judges.lenght' (did you mean 'judges.length'?)"),
    ({"judge": {"use": "judges.length:LenghtJudge"}}, "has no 'LenghtJudge' (did you mean 'LengthJudge'?)"),
    ({"judge": {"use": "judges.length:LengthJudge", "targt": 3}}, "unknown key 'targt' (did you mean 'target'?)"),
    ({"judge": {"use": "judges.length:LengthJudge", "unit": "miles"}}, "no unit 'miles'"),
    ({"evaluation": {"judge": {"use": "nowhere_at_all:Judge"}}}, "no module 'nowhere_at_all'"),
]


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input_is_one_line(desk: Desk, command: str, changes: dict[str, Any], message: str) -> None:
    error = one_line(desk(command, desk.write(**changes)))
    assert message in error
    assert not (desk.folder / "runs").exists()
    assert desk.calls == []


def test_files_that_are_no_experiment(desk: Desk) -> None:
    assert one_line(desk("run", desk.folder / "absent.yaml")) == f"no experiment file at {desk.folder / 'absent.yaml'}"
    assert "is a folder" in one_line(desk("check", desk.folder))
    desk.file.write_text("name: [unclosed", encoding="utf-8")
    assert "is not valid YAML" in one_line(desk("run", desk.file))
    desk.file.write_text("- a\n- b\n", encoding="utf-8")
    assert "an experiment is a mapping of keys, found a list" in one_line(desk("run", desk.file))
    desk.file.write_bytes(b"\xff\xfe\x00name")
    assert "is not UTF-8 (line 1)" in one_line(desk("run", desk.file))
    desk.file.write_text("name: a\nname: b\n", encoding="utf-8")
    assert "key 'name' stands twice (line 2)" in one_line(desk("run", desk.file))


def test_hostile_names_are_told_harmlessly(desk: Desk) -> None:
    error = one_line(desk("run", desk.write(**{"\x1b[2J\x1b]0;pwned\x07key": 1})))
    assert not CONTROL.search(error)
    assert "key" in error


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("dpo.betta=1", "unknown key 'dpo.betta' (did you mean 'beta'?)"),
        ("rounds", "write key=value"),
        ("name.sub=1", "'name' holds a value, not a mapping"),
        ("dpo=[", "is not valid YAML"),
    ],
)
def test_bad_overrides(desk: Desk, assignment: str, message: str) -> None:
    assert message in one_line(desk("run", desk.file, "--set", assignment))


def test_a_folder_that_is_no_run(desk: Desk) -> None:
    for command in ("resume", "show"):
        assert one_line(desk(command, desk.folder)) == f"{desk.folder} is no run folder (no manifest.json in it)"
        assert "is no run folder" in one_line(desk(command, desk.file))


def test_an_output_that_cannot_be_made(desk: Desk) -> None:
    error = one_line(desk("run", desk.file, "--set", f"output={desk.file}"))
    assert f"the run folder {desk.file}/tiny cannot be made" in error


def test_a_maximal_length_that_is_too_short(desk: Desk) -> None:
    error = one_line(desk("run", desk.file, "--set", "engine.max_model_len=9"))
    assert "engine.max_model_len is 9, but the longest prompt" in error


def test_wrong_usage(desk: Desk) -> None:
    for arguments in (["run"], ["run", desk.file, "--nonsense"], ["walk"], ["run", desk.file, "--seed", "x"]):
        assert desk(*arguments).exit_code == 2
    assert "seeds" in one_line(desk("run", desk.file, "--seed", "-1"))


# --- check ---


def test_check_prints_the_plan_and_runs_nothing(desk: Desk) -> None:
    before = sorted(desk.folder.rglob("*"))
    result = desk("check", desk.file)
    assert result.exit_code == 0, result.stderr
    assert "prompts: 8 to train, 4 held out" in result.stdout
    assert f"run folder: {desk.root}" in result.stdout
    # Two rounds: 3·3 answers, 9 + 4 judged and 4 before, 3 pairs, 2 steps, (9 + 4)·8 tokens and 4·8 before.
    assert re.search(r"^ *on_policy +2 +18 +30 +6 +4 +240 ", result.stdout, re.MULTILINE), result.stdout
    assert re.search(r"^ *source +current +initial", result.stdout, re.MULTILINE)
    assert "engine: " in result.stdout
    assert "warning: one seed: intervals are over prompts only" in result.stdout
    assert sorted(desk.folder.rglob("*")) == before
    assert desk.calls == []


def test_check_of_an_experiment_that_runs_already_says_nothing_of_it(desk: Desk) -> None:
    desk("run", desk.file)
    assert desk("check", desk.file, "--set", "dpo.beta=0.7").exit_code == 0


# --- run, resume, show ---


def test_run_prints_its_tables_and_folder(desk: Desk) -> None:
    result = desk("run", desk.file)
    assert result.exit_code == 0, result.stderr
    for part in ("Held-out reward", "Pairs", "Training", "Speed", "Budget", "Prompt: ", "self_offline, round 2"):
        assert part in result.stdout
    assert "one seed: intervals are over prompts" in result.stdout
    assert result.stdout.splitlines()[-1] == f"run folder: {desk.root}"
    assert "on_policy · seed 0 · round 1 sample: 9 answers" in result.stderr
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 100


def test_quiet(desk: Desk) -> None:
    result = desk("run", desk.file, "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "Held-out reward" in result.stdout


def test_a_finished_run_does_nothing_and_prints_the_same(desk: Desk) -> None:
    first = desk("run", desk.file)
    count = len(desk.calls)
    for again in (desk("run", desk.file), desk("resume", desk.root)):
        assert again.exit_code == 0
        assert again.stderr == ""
        assert again.stdout == "this run is finished; nothing to do\n" + first.stdout
    assert desk("show", desk.root).stdout == first.stdout
    assert len(desk.calls) == count


def test_set_and_seed(desk: Desk) -> None:
    result = desk(
        "run", desk.file, "--set", "rounds=1", "--set", "arms.on_policy.dpo.lr=5e-7", "--seed", 3, "--seed", 4
    )
    assert result.exit_code == 0, result.stderr
    experiment = RunStore.open(desk.root).experiment
    assert experiment.seeds == [3, 4]
    assert experiment.arm("on_policy").dpo.lr == 5e-7
    assert experiment.arm("self_offline").dpo.lr == 1e-6
    assert sorted(path.name for path in (desk.root / "arms" / "on_policy").iterdir()) == ["seed_3", "seed_4"]
    assert sorted(path.name for path in (desk.root / "arms/on_policy/seed_3").iterdir()) == ["round_00", "round_01"]


def test_a_changed_experiment_is_refused_by_its_keys(desk: Desk) -> None:
    assert desk("run", desk.file).exit_code == 0
    error = one_line(desk("run", desk.file, "--set", "dpo.beta=0.5", "--set", "rounds=3"))
    assert f"{desk.root} holds a run of another experiment; it differs in rounds, dpo.beta" in error
    arms: dict[str, Any] = {"on_policy": {}, "self_offline": {"source": "initial"}, "third": None}
    assert "differs in arms.third" in one_line(desk("run", desk.write(arms=arms)))


def test_changed_prompts_and_another_model_are_refused(desk: Desk, tmp_path: Path, small_model: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in small_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    desk.spec["model"] = str(model)
    assert desk("run", desk.write()).exit_code == 0
    rows = (desk.folder / "prompts.jsonl").read_text(encoding="utf-8")
    (desk.folder / "prompts.jsonl").write_text(rows.replace("number 7", "number seven"), encoding="utf-8")
    assert "the prompts are not those that the run began with" in one_line(desk("run", desk.file))
    (desk.folder / "prompts.jsonl").write_text(rows, encoding="utf-8")
    assert desk("run", desk.file).exit_code == 0
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}), encoding="utf-8")
    for command, target in (("run", desk.file), ("resume", desk.root)):
        assert "is not the one the run began with" in one_line(desk(command, target))


def test_a_judge_changed_between_two_rounds_is_refused(desk: Desk) -> None:
    """Round 1 was scored by another judge: its reward, and the change against round 0, would compare nothing."""
    name = f"judge_{abs(hash(desk.folder))}"
    file = desk.folder / f"{name}.py"
    text = "class Mine:\n    def score(self, prompt, candidates):\n        return [len(c.text) for c in candidates]\n"
    file.write_text(text, encoding="utf-8")
    desk.engine = interrupting(at=4)
    assert desk("run", desk.write(judge={"use": f"{name}:Mine"})).exit_code == 130
    file.write_text(text.replace("len(", "-len("), encoding="utf-8")
    for command, target in (("run", desk.file), ("resume", desk.root)):
        assert "the source of arm on_policy's judge was changed after the run began" in one_line(desk(command, target))
    file.write_text(text, encoding="utf-8")
    desk.engine = FakeEngine
    assert desk("resume", desk.root).exit_code == 0


def test_changed_prompts_of_the_run_itself_are_refused(desk: Desk) -> None:
    desk.engine = interrupting(at=4)
    assert desk("run", desk.file).exit_code == 130
    file = desk.root / "prompts.parquet"
    file.write_bytes(file.read_bytes()[:-4])
    assert "prompts.parquet is missing or damaged" in one_line(desk("resume", desk.root))


def test_a_run_in_use_is_refused(desk: Desk) -> None:
    desk.engine = interrupting(at=4)
    assert desk("run", desk.file).exit_code == 130
    hold = (
        "import sys, time; from pathlib import Path; from online_dpo.store import RunStore\n"
        "with RunStore(Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(desk.root)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            assert one_line(desk("resume", desk.root)) == f"{desk.root} is in use by another process"
            assert desk("show", desk.root).exit_code == 0  # reading needs no lock
        finally:
            holder.kill()
    desk.engine = FakeEngine
    assert desk("resume", desk.root).exit_code == 0


# --- what goes wrong on the way ---


def interrupting(at: int, error: BaseException | None = None) -> Callable[[list[tuple[Any, ...]]], FakeEngine]:
    """An engine whose `at`-th sampling ends, after one answer, in `error` (default: Ctrl-C)."""

    class Interrupting(FakeEngine):
        def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
            answers = super().sample(requests, sampling)
            yield next(answers)
            if sum(call[0] == "sample" for call in self.calls) == at:
                raise error or KeyboardInterrupt
            yield from answers

    return Interrupting


def test_ctrl_c_says_how_to_go_on_and_that_works(desk: Desk, tmp_path: Path) -> None:
    desk.engine = interrupting(at=4)
    result = desk("run", desk.file)
    assert result.exit_code == 130
    assert result.stdout == f"stopped; go on with: online-dpo resume {desk.root}\n"
    assert "Traceback" not in result.stderr
    shown = desk("show", desk.root)
    assert shown.exit_code == 0
    assert "on_policy, round 1" in shown.stdout
    assert "round 2" not in shown.stdout

    desk.engine = FakeEngine
    resumed = desk("resume", desk.root)
    assert resumed.exit_code == 0
    whole = desk("run", desk.file, "--set", "name=whole")
    assert answers_shown(resumed.stdout) == answers_shown(whole.stdout)


def answers_shown(text: str) -> list[str]:
    """The answers before and after, without the tables above, which hold seconds, and the folder below."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Prompt: "))
    return lines[start:-1]


def test_show_of_a_run_that_has_measured_nothing_yet(desk: Desk) -> None:
    desk.engine = interrupting(at=1)
    assert desk("run", desk.file).exit_code == 130
    assert desk("show", desk.root).stdout == f"run folder: {desk.root}\n"


def test_a_stopped_arm_ends_with_1_and_the_tables(desk: Desk) -> None:
    desk.learner = lambda calls: FakeLearner(calls, stop=lambda policy: policy.startswith("self_offline"))
    result = desk("run", desk.file)
    assert result.exit_code == 1
    assert "self_offline · seed 0 stopped early: loss nan" in result.stdout
    assert "on_policy, round 2" in result.stdout
    assert "Traceback" not in result.stderr


def test_an_engine_error_is_one_line_and_1(desk: Desk) -> None:
    desk.engine = interrupting(at=1, error=EngineError("the engine does not\nhold \x1b[31mthe weights"))
    result = desk("run", desk.file, "--quiet")
    assert one_line(result, code=1) == "the engine does not hold the weights"


def test_debug_shows_the_trace(desk: Desk) -> None:
    result = desk("check", desk.write(betta=1), "--debug")
    assert isinstance(result.exception, ConfigError)
    assert result.exit_code == 1


HOSTILE = "\x1b[2J\x1b]0;pwned\x07\x9b31m[bold red]b[/] [link=http://x]y[/link]\r\x08\u202eevil\x00 end"


def test_hostile_answers_are_printed_harmlessly(desk: Desk) -> None:
    """Escape sequences, C1 controls, right-to-left overrides and rich's markup arrive as text or not at all."""

    class Hostile(FakeEngine):
        def candidate(self, prompt: Prompt, index: int, seed: int) -> Candidate:
            made = super().candidate(prompt, index, seed)
            text = HOSTILE + " x" * index
            return Candidate(made.prompt_id, index, text, made.token_ids, made.logprobs, made.finish_reason, seed)

    desk.engine = Hostile
    rows = [json.dumps({"prompt": f"{HOSTILE} {i}"}) for i in range(12)]
    (desk.folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    result = desk("run", desk.file)
    assert result.exit_code == 0, result.stderr
    for text in (result.stdout, result.stderr, desk("show", desk.root).stdout):
        assert not CONTROL.search(text.replace("\n", "")), CONTROL.findall(text)
        assert "pwned" not in text
    assert "[bold red]b[/] [link=http://x]y[/link] evil end" in result.stdout


# --- the real command ---


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    line = [sys.executable, "-m", "online_dpo.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_version() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{online_dpo.__version__}\n", "")


def test_help_names_every_command() -> None:
    for arguments in (["--help"], []):
        done = command(*arguments)
        assert done.returncode == (0 if arguments else 2)
        for name in ("run", "resume", "check", "show"):
            assert re.search(rf"\b{name}\b", done.stdout + done.stderr)


def test_an_error_of_the_real_command_and_its_trace(tmp_path: Path) -> None:
    done = command("run", tmp_path / "absent.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"online-dpo: no experiment file at {tmp_path / 'absent.yaml'}\n"
    done = command("run", tmp_path / "absent.yaml", "--debug")
    assert done.returncode != 0
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "ConfigError: no experiment file" in done.stderr


def test_a_hub_id_without_the_hub(desk: Desk, tmp_path: Path) -> None:
    """Offline, one line tells what to do; nothing waits for a network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = command("check", desk.write(model="some-org/some-model"), **offline)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "model 'some-org/some-model' is not on this machine and the hub does not give it" in done.stderr
    assert "download it on another machine and give the folder's path" in done.stderr
    assert "smollm2-135m-instruct" in done.stderr
    spec = {"path": "some-org/some-prompts", "per_round": 3, "held_out": 4}
    done = command("check", desk.write(prompts=spec), **offline)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "some-org/some-prompts" in done.stderr


def test_what_judges_spent_is_shown_and_a_raised_budget_goes_on(desk: Desk) -> None:
    """A judge of one call a prompt: 4 held-out, 3 + 4 a round, two rounds (the second arm has the first round from
    the first, and its own second): the budget of 6 ends the first round, a raised one lets the same command go on."""
    (desk.folder / "paid.py").write_text(
        "from judges.length import LengthJudge\n"
        "class Paid(LengthJudge):\n"
        "    cached = True\n"
        "    calls = 0\n"
        "    def score(self, prompt, candidates):\n"
        "        self.calls += 1\n"
        "        return super().score(prompt, candidates)\n"
        "    def ledger(self):\n"
        "        calls, self.calls = self.calls, 0\n"
        "        return {'calls': calls} if calls else {}\n",
        encoding="utf-8",
    )
    file = desk.write(judge={"use": "paid:Paid", "unit": "characters"}, judge_budget={"calls": 6})
    stopped = desk("run", file)
    assert stopped.exit_code == 2
    assert "budget is used up: calls 6 of 6" in stopped.stderr
    assert "raise judge_budget.calls" in stopped.stderr
    done = desk("run", file, "--set", "judge_budget.calls=1000")
    assert done.exit_code == 0, done.stderr
    [spent] = [line for line in done.stdout.splitlines() if line.startswith("judges spent: ")]
    assert int(spent.split()[-1]) > 6
    assert spent in desk("show", desk.root).stdout
    assert desk("resume", desk.root).exit_code == 0
