"""Keys and passwords in an experiment are refused, unsaid; errors and logs repeat none of the environment's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile_runs import cli, holding
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_double import Double, Step, said
from test_loop import World, experiment

from online_dpo.config import validate_experiment
from online_dpo.errors import ConfigError, JudgeError, one_line
from online_dpo.keys import literal_key, without_keys

KEY = "sk-proj-Zx81mQ0vTr5Yb2Nw7Lk4_Hd9Gf3-JcPs6"
"""Of the form of a well-known service's; opens nothing."""
OTHERS = (
    "sk-0123456789abcdef0123456789abcdef",
    "sk-ant-api03-Zx81mQ0vTr5Yb2Nw7Lk4Hd9Gf3JcPs6",
    "hf_Zx81mQ0vTr5Yb2Nw7Lk4Hd9Gf3JcPs6AbCd",
    "ghp_Zx81mQ0vTr5Yb2Nw7Lk4Hd9Gf3JcPs6AbCd",
    "gsk_Zx81mQ0vTr5Yb2Nw7Lk4Hd9Gf3JcPs6AbCd",
    "AKIAIOSFODNN7EXAMPLE",
    "Bearer sk-proj-Zx81mQ0vTr5Yb2Nw7Lk4Hd9Gf3JcPs6",
    "http://user:pa55word@localhost:8000/v1",
    "-----BEGIN PRIVATE KEY-----",
)
LLM = {"use": "judges.llm:LLMScoreJudge", "model": "m", "base_url": "http://127.0.0.1:9/v1"}
PLACES: dict[str, dict[str, Any]] = {
    "judge.api_key": {"judge": {**LLM, "api_key": "short"}},
    "judge.api_key_env": {"judge": {**LLM, "api_key_env": KEY}},
    "judge.base_url": {"judge": {**LLM, "base_url": "http://me:secret1@127.0.0.1:9/v1"}},
    "judge.extra_body.headers.Authorization": {"judge": {**LLM, "extra_body": {"headers": {"Authorization": "x"}}}},
    "judge.judges.api-key": {"judge": {"use": "judges.panel:PanelJudge", "judges": [{**LLM, "api-key": "x"}]}},
    "prompts.system": {"prompts": {"path": "p.jsonl", "system": f"Use {KEY}."}},
    "arms.b.judge.criteria": {"arms": {"a": {}, "b": {"judge": {**LLM, "criteria": KEY}}}},
    "tracking.wandb": {"tracking": {"wandb": KEY}},
    "openai_api_key": {"openai_api_key": "x"},
    "name": {"name": KEY},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_key_in_an_experiment_is_refused_and_not_repeated(place: str, tmp_path: Path) -> None:
    """By `check` and by `run`, before anything is written; the rest of the file is good."""
    file = tmp_path / "experiment.yaml"
    spec = {**experiment().model_dump(mode="json"), "output": str(tmp_path / "runs"), **PLACES[place]}
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    for command in ("check", "run"):
        line = cli(command, file).refused
        assert f"{place} looks like a key in plain text" in line
        assert KEY not in line and "secret1" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.yaml"]


@pytest.mark.parametrize("text", OTHERS)
def test_known_forms_of_keys(text: str) -> None:
    assert literal_key({"a": [{"b": text}]}) == "a.b"
    assert text.removeprefix("Bearer ") not in without_keys(f"refused: {text}")


def test_a_key_given_by_set_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment().model_dump(mode="json")), encoding="utf-8")
    line = cli("check", file, "--set", f"judge.api_key={KEY}").refused
    assert "judge.api_key looks like a key" in line and KEY not in line


def test_a_key_given_to_an_audit_is_refused() -> None:
    line = cli(
        "judge", "audit", "--judge", "judges.llm:LLMScoreJudge", "--set", f"api_key={KEY}", "--pairs", "p.jsonl"
    ).refused  # fmt: skip
    assert "api_key looks like a key" in line and KEY not in line


@pytest.mark.parametrize(
    "data",
    [
        {"judge": {"use": "a:b", "api_key_env": "MY_KEY", "special_tokens": ["<x>"], "token_limit": "max_tokens"}},
        {"judge_budget": {"tokens": 5, "cost": 1.0}, "learner": {"tokens_per_pass": 9}},
        {"model": "runs/sk-learn-something-long-with-a-2", "name": "hf_comparison-of-things-2026"},
        {"judge": {"api_key": None, "password": ""}},
        {"prompts": {"path": "https-notes.jsonl", "system": "Never tell a secret: at http://host:80/a@b"}},
        {"judge": {"target": "keyword", "keyword": "secret", "secrets": 3}},
    ],
)
def test_what_is_no_key_is_none(data: dict[str, Any]) -> None:
    assert literal_key(data) is None


def test_aliases_of_yaml_are_looked_at_once() -> None:
    """Ten levels of ten aliases are 10¹⁰ texts to whoever goes through all of them."""
    level: Any = ["x"]
    for _ in range(10):
        level = [level] * 10
    assert literal_key({"a": level, "b": {"api_key": "x"}}) == "b.api_key"


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_taking_keys_out_leaves_other_text_alone(text: str) -> None:
    shown = without_keys(text)
    assert shown == text or "***" in shown


def test_errors_repeat_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", "correct horse battery staple")
    monkeypatch.setenv("SHORT_TOKEN", "the")
    line = one_line(ValueError("401: 'correct horse battery staple' is the wrong key"))
    assert line == "ValueError: 401: '***' is the wrong key"


def test_every_refusal_of_the_command_line_hides_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0a1b2c3d4e5f60718293a4b5c6d7e8f9")
    assert "0a1b2c3d" not in cli("show", tmp_path / "0a1b2c3d4e5f60718293a4b5c6d7e8f9").refused


def test_a_judges_reason_to_abstain_hides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a judge raises becomes a reason in verdicts.parquet, in metrics.json and in reports."""
    from llm_double import PROMPT, candidate

    from judges.function import FunctionJudge

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    [said] = FunctionJudge("test_security_keys:raising").score(PROMPT, [candidate("x")])
    assert "***" in str(said) and KEY not in str(said)


def raising(prompt: str, answer: str) -> float:
    raise ValueError(f"the server refused {KEY}")


def test_a_key_of_the_environment_is_in_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the judge's digest nor its description holds it: they are built from the spec, which names a variable."""
    from online_dpo.config import JudgeSpec
    from online_dpo.judging import load_judge

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    spec = JudgeSpec.model_validate(LLM)
    judge = load_judge(spec, [])
    assert KEY not in json.dumps(spec.model_dump(mode="json"))
    assert KEY not in repr(judge)


def test_a_name_of_a_variable_that_is_a_key_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that happens to have a variable's form, where the name of one belongs."""
    from online_dpo.config import JudgeSpec
    from online_dpo.judging import load_judge

    spec = JudgeSpec.model_validate({**LLM, "api_key_env": "abcdef0123456789abcdef0123456789"})
    with pytest.raises(JudgeError) as caught:
        load_judge(spec, [])
    assert "abcdef0123" not in str(caught.value)


def test_the_experiment_of_a_received_folder_is_held_to_the_same(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="looks like a key"):
        validate_experiment({**experiment().model_dump(mode="json"), "judge": {**LLM, "api_key": "x"}}, "test")


def test_a_whole_run_holds_no_byte_of_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server whose errors repeat the key, one for a while and one for good; fakes sample and train.
    end_to_end/test_security_run.py has the same with Ray, actors and every command."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(os, "fsync", lambda handle: None)

    def says(request: dict[str, Any], number: int) -> Step | dict[str, Any]:
        if number in (3, 4):
            return Step(
                {"error": {"message": f"Authorization: Bearer {KEY}", "code": None}}, 500 if number == 3 else 400
            )
        return said("12345678"[number % 8])

    with Double(says) as server:
        judge = {**LLM, "base_url": server.url, "high": 8, "logprobs": "no", "concurrency": 1}
        spec = experiment(judge=judge, arms={"on_policy": {}}, rounds=1, max_abstain=0.9)
        world = World(tmp_path / "run", spec).go()
        assert all(headers["authorization"] == f"Bearer {KEY}" for headers in server.headers)
    assert len(server.requests) > 10
    for command in ("show", "watch", "compare"):
        told = cli(command, world.root)
        (tmp_path / f"{command}.txt").write_text(told.out + told.err, encoding="utf-8")
        assert told.out
    assert holding(tmp_path, KEY) == []
    assert len(holding(tmp_path, "judges.llm:LLMScoreJudge")) > 1, "the search finds nothing"
    assert any(path.suffix == ".parquet" for path in holding(tmp_path, "the server refused the request"))
