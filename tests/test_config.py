"""The experiment schema: what is read, what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from online_dpo.config import Experiment, ReferenceSpec, apply_override, load_experiment, merge
from online_dpo.errors import ConfigError
from online_dpo.source_spec import SourceSpec

MINIMAL = """\
name: tiny
model: some-model
prompts: {path: prompts.jsonl}
judge: {use: "judges.length:LengthJudge"}
"""

Load = Callable[..., Experiment]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads MINIMAL with lines added, or a whole text."""

    def load_text(
        added: str = "", *overrides: str, text: str | None = None, seeds: list[int] | None = None
    ) -> Experiment:
        file = tmp_path / "experiment.yaml"
        file.write_text(MINIMAL + added if text is None else text, encoding="utf-8")
        return load_experiment(file, list(overrides), seeds)

    return load_text


def fault(load: Load, added: str = "", *overrides: str, **more: Any) -> str:
    """The one line that says what is wrong."""
    with pytest.raises(ConfigError) as caught:
        load(added, *overrides, **more)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


# --- what is read ---


def test_defaults(load: Load) -> None:
    experiment = load()
    assert list(experiment.arms) == ["on_policy"]
    assert experiment.seeds == [0]
    assert experiment.arm("on_policy").source == "current"
    assert experiment.arm("on_policy").reference == "prior"
    assert experiment.arm("on_policy").dpo.beta == 0.1
    assert experiment.lora is None


@pytest.mark.parametrize("text", ["5e-7", "'5e-7'", "5.0e-7", "0.0000005"])
def test_exponents_without_a_point_are_numbers(load: Load, text: str) -> None:
    # YAML 1.1 reads 5e-7 as a string: only 5.0e-7 is a number to it.
    assert load(f"dpo: {{lr: {text}}}").dpo.lr == 5e-7
    assert load("", f"dpo.lr={text}").dpo.lr == 5e-7


def test_judge_keys_go_to_its_constructor(load: Load) -> None:
    judge = load("evaluation: {judge: {use: 'my.module:Mine', target: 20, words: [a]}}").evaluation_judge("on_policy")
    assert judge.use == "my.module:Mine"
    assert judge.params == {"target": 20, "words": ["a"]}


def test_the_evaluation_judge_is_the_arms_own_by_default(load: Load) -> None:
    experiment = load("arms: {a: {}, b: {judge: {use: 'x:Y'}}}")
    assert experiment.evaluation_judge("a").use == "judges.length:LengthJudge"
    assert experiment.evaluation_judge("b").use == "x:Y"


# --- arms ---


def test_arm_keys_merge_into_the_experiments(load: Load) -> None:
    experiment = load("dpo: {beta: 0.3, lr: 1e-5}\nrounds: 4\narms: {a: {dpo: {beta: 0.5}}, b: {rounds: 2}}")
    a, b = experiment.arm("a"), experiment.arm("b")
    assert (a.dpo.beta, a.dpo.lr, a.rounds) == (0.5, 1e-5, 4)
    assert (b.dpo.beta, b.dpo.lr, b.rounds) == (0.3, 1e-5, 2)
    assert experiment.dpo.beta == 0.3


def test_an_empty_arm(load: Load) -> None:
    assert list(load("arms:\n  a:\n  b: {rounds: 2}").arms) == ["a", "b"]


def test_sources(load: Load) -> None:
    experiment = load("arms: {a: {source: initial}, b: {source: {every: 2}}, c: {}}")
    assert experiment.arm("a").source == "initial"
    assert experiment.arm("b").source == SourceSpec(every=2)
    assert experiment.arm("c").source == "current"


def test_a_judge_with_use_is_replaced_whole_without_it_merged(load: Load) -> None:
    experiment = load(
        "",
        text=MINIMAL.replace('LengthJudge"}', 'LengthJudge", target: 20}')
        + "arms: {whole: {judge: {use: 'x:Y'}}, merged: {judge: {unit: words}}}",
    )
    assert experiment.arm("whole").judge.params == {}
    assert experiment.arm("merged").judge.params == {"target": 20, "unit": "words"}


def test_merge_changes_neither_argument() -> None:
    base = {"a": {"b": [1]}, "c": 1}
    change = {"a": {"d": [2]}}
    result = merge(base, change)
    result["a"]["b"].append(3)
    result["a"]["d"].append(4)
    assert base == {"a": {"b": [1]}, "c": 1}
    assert change == {"a": {"d": [2]}}
    assert result == {"a": {"b": [1, 3], "d": [2, 4]}, "c": 1}


def test_no_such_arm(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"no arm 'on_polcy' \(did you mean 'on_policy'\?\); arms: on_policy"):
        load().arm("on_polcy")


# --- what is refused ---


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("promts: {}", "unknown key 'promts' (did you mean 'prompts'?)"),
        ("dpo: {bta: 0.1}", "unknown key 'dpo.bta' (did you mean 'beta'?)"),
        ("arms: {a: {dpo: {bta: 0.1}}}", "unknown key 'arms.a.dpo.bta' (did you mean 'beta'?)"),
        ("arms: {a: {source: {evry: 2}}}", "unknown key 'arms.a.source.evry' (did you mean 'every'?)"),
        ("arms: {a: {reference: {emma: 0.5}}}", "unknown key 'arms.a.reference.emma' (did you mean 'ema'?)"),
        ("reference: {evry: 2}", "unknown key 'reference.evry' (did you mean 'every'?)"),
        ("evaluation: {jugde: {use: 'a:B'}}", "unknown key 'evaluation.jugde' (did you mean 'judge'?)"),
        ("lora: {rnak: 8}", "unknown key 'lora.rnak' (did you mean 'rank'?)"),
        ("learner: {zzz: 8}", "unknown key 'learner.zzz'; known: workers, parallel,"),
        (
            "arms: {a: {model: other}}",
            "arms.a.model: 'model' is one for all arms; an arm may change rounds, algorithm,",
        ),
    ],
)
def test_unknown_keys_name_the_nearest_right_one(load: Load, added: str, says: str) -> None:
    assert says in fault(load, added)


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("dpo: {lr: abc}", "dpo.lr: Input should be a valid number"),
        ("dpo: {lr: .nan}", "dpo.lr: Input should be a finite number"),
        ("dpo: {lr: -1}", "dpo.lr: Input should be greater than 0"),
        ("dpo: {lr: [1]}", "dpo.lr: Input should be a valid number"),
        ("dpo: 3", "dpo: a mapping of keys is expected"),
        ("rounds: 2.5", "rounds: Input should be a valid integer"),
        ("rounds: 0", "rounds: Input should be greater than or equal to 1"),
        ("revision: 3", "revision: Input should be a valid string"),
        ("engine: {kind: vlm}", "engine.kind: Input should be 'auto', 'vllm' or 'transformers' (found 'vlm')"),
        ("arms: {a: {source: initail}}", "arms.a.source: Input should be 'current' or 'initial' (found 'initail')"),
        ("arms: {a: 3}", "arms.a: a mapping of keys is expected (found 3)"),
        ("arms: {}", "arms: at least one arm is needed"),
        ("arms: {a/b: {}}", "arms.a/b: letters, digits"),
        ("lora: {dropout: 0.1}", "lora.dropout: Input should be 0"),
        ("seeds: []", "seeds: List should have at least 1 item"),
        ("seeds: [0, 0]", "seeds: the same seed twice"),
        ("arms: {a: {}, b: {}}\ncontrasts: [[a, c]]", "contrasts: no arm 'c'"),
        ("arms: {a: {}, b: {}}\ncontrasts: [[a, a]]", "contrasts: a against a is no comparison"),
        ("arms: {a: {}, b: {}}\ncontrasts: [[a, b], [b, a]]", "contrasts: b against a stands twice"),
        ("arms: {a: {}, b: {}}\ncontrasts: []", "contrasts: at least one is needed"),
        ("seeds: [-1]", "seeds.0: Input should be greater than or equal to 0"),
        ("evaluation: {judge: {}}", "key 'evaluation.judge.use' is missing"),
        ("evaluation: {judge: {use: Mine}}", 'evaluation.judge.use: a judge is named as "module:Class"'),
    ],
)
def test_wrong_values_are_named_with_their_key(load: Load, added: str, says: str) -> None:
    assert says in fault(load, added)


def test_missing_keys_and_the_count_of_further_faults(load: Load) -> None:
    message = fault(load, text="name: tiny\nmodel: m\n")
    assert "key 'judge' is missing (and 1 more)" in message
    assert "experiment.yaml: " in message


@pytest.mark.parametrize("name", ["a b", "../x", ".hidden", "", "x" * 65])
def test_names_are_safe_as_folders(load: Load, name: str) -> None:
    assert "name: letters, digits" in fault(load, text=MINIMAL.replace("tiny", f"'{name}'"))


@pytest.mark.parametrize(
    ("added", "key"),
    [("name: again", "name"), ("dpo: {lr: 1, lr: 2}", "lr"), ("arms: {a: {}, b: {}, a: {rounds: 2}}", "a")],
)
def test_the_same_key_twice(load: Load, added: str, key: str) -> None:
    assert f"key '{key}' stands twice (line 5)" in fault(load, added)


@pytest.mark.parametrize("text", ["- 1", "", "3", "just words"])
def test_a_file_that_is_no_mapping(load: Load, text: str) -> None:
    assert "an experiment is a mapping of keys" in fault(load, text=text)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\x00", "a: !!python/object:os.system {}"])
def test_broken_yaml_is_one_line(load: Load, text: str) -> None:
    assert "is not valid YAML" in fault(load, text=text)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no experiment file at"):
        load_experiment(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is a folder; an experiment is a YAML file"):
        load_experiment(tmp_path)


# --- --set and --seed ---


def test_overrides(load: Load) -> None:
    experiment = load("", "dpo.beta=0.2", "arms.on_policy.rounds=6", "seeds=[1, 2]", "model=a=b", "lora.rank=8")
    assert experiment.dpo.beta == 0.2
    assert experiment.arm("on_policy").rounds == 6
    assert experiment.seeds == [1, 2]
    assert experiment.model == "a=b"
    assert experiment.lora is not None
    assert experiment.lora.rank == 8


def test_later_overrides_win_and_null_takes_away(load: Load) -> None:
    experiment = load("lora: {rank: 8}", "dpo.beta=0.2", "dpo.beta=0.3", "lora=null")
    assert experiment.dpo.beta == 0.3
    assert experiment.lora is None


def test_seeds_given_beside_the_file_win(load: Load) -> None:
    assert load("seeds: [1]", "seeds=[2]", seeds=[5, 6]).seeds == [5, 6]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("dpo.bta=0.2", "unknown key 'dpo.bta' (did you mean 'beta'?)"),
        ("dpo", "--set dpo: write key=value"),
        ("=3", "--set =3: write key=value"),
        ("name.x=3", "--set name.x: 'name' holds a value, not a mapping"),
        ("dpo.beta=[1", "--set dpo.beta: '[1' is not valid YAML"),
        ("dpo.beta=", "dpo.beta: Input should be a valid number"),
    ],
)
def test_wrong_overrides(load: Load, override: str, says: str) -> None:
    assert says in fault(load, "", override)


def test_override_creates_the_mappings_on_its_way() -> None:
    data: dict[str, Any] = {"arms": None}
    apply_override(data, " arms.a.dpo.beta = 1 ")
    assert data == {"arms": {"a": {"dpo": {"beta": 1}}}}


# --- not right yet: each stops being an expected failure when it is put right ---


@pytest.mark.parametrize("added", ["rounds: true", "dpo: {lr: yes}"])
def test_true_is_no_number(load: Load, added: str) -> None:
    fault(load, added)


def test_merge_keys(load: Load) -> None:
    experiment = load("dpo: &base {beta: 0.3}\narms: {a: {dpo: {<<: *base, lr: 1e-5}}}")
    assert experiment.arm("a").dpo.beta == 0.3


def test_every_zero_says_what_is_wrong(load: Load) -> None:
    assert "arms.a.source.every: Input should be greater than or equal to 1" in fault(
        load, "arms: {a: {source: {every: 0}}}"
    )


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("{ema: 0}", "reference.ema: Input should be greater than 0 (found 0)"),
        ("{ema: 1.5}", "reference.ema: Input should be less than or equal to 1 (found 1.5)"),
        ("{every: 0}", "reference.every: Input should be greater than or equal to 1 (found 0)"),
        ("{every: 2, ema: 0.5}", "reference: either every or ema is needed, and not both"),
        ("{}", "reference: either every or ema is needed, and not both"),
        ("priro", "reference: Input should be 'prior' or 'initial' (found 'priro')"),
    ],
)
def test_a_reference_that_is_none_is_named(load: Load, reference: str, says: str) -> None:
    for added in (f"reference: {reference}", f"arms: {{a: {{reference: {reference}}}}}"):
        said = fault(load, added)
        assert says in said
        assert "\n" not in said


def test_an_arms_reference_takes_the_place_of_the_experiments(load: Load) -> None:
    """Two rules do not merge into one that has both."""
    experiment = load("reference: {every: 3}\narms: {a: {reference: {ema: 0.5}}, b: {reference: prior}, c: {}}")
    assert experiment.arm("a").reference == ReferenceSpec(ema=0.5)
    assert experiment.arm("b").reference == "prior"
    assert experiment.arm("c").reference == ReferenceSpec(every=3)
