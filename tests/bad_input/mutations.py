"""Random changes of a right experiment: keys misspelt, gone, elsewhere; values of other types; bytes of noise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

Data = dict[str, Any]
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    10**30,
    -(10**400),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1e999",
    "../../x",
    "\x1b[2J\u202e",
    "{{ 7 * 7 }}",
    "x" * 100_000,
    [],
    [[]],
    [1, "a", None],
    {},
    {"a": {"b": {}}},
    {"use": "os:system"},
)
SIGNS = (b":", b"- ", b"\t", b"&a ", b"*a", b"!!", b"{", b"]", b"'", b"#", b"%", b"\n")
"""What has a meaning in YAML."""
RIGHT: Data = {
    "name": "right",
    "seeds": [0, 1],
    "model": "smollm2-135m-instruct",
    "prompts": {"path": "prompts.jsonl", "per_round": 8, "held_out": 8, "max_tokens": 64},
    "sampling": {"n": 4, "temperature": 1.0, "top_p": 0.9, "max_tokens": 32},
    "judge": {"use": "judges.length:LengthJudge", "unit": "words"},
    "max_abstain": 0.2,
    "judge_timeout": 60,
    "pairing": {"rule": "best_vs_worst", "min_margin": 0.1},
    "dpo": {"loss": "sigmoid", "beta": 0.1, "lr": 1e-6, "batch_size": 8, "epochs": 1},
    "lora": {"rank": 8, "alpha": 16},
    "rounds": 3,
    "engine": {"kind": "transformers", "batch_size": 8},
    "learner": {"workers": 1},
    "cluster": {"lanes": 1},
    "evaluation": {"show": 2, "off_policy": 8},
    "arms": {
        "on_policy": {},
        "late": {"source": {"lag": 1}},
        "semi": {"source": {"every": 2}, "rounds": 2},
        "mixed": {"source": {"mixture": [{"share": 0.5, "source": "current"}, {"share": 0.5, "source": "initial"}]}},
    },
    "output": "runs",
}
"""An experiment that is right, with most sections."""


def mutated(right: Data, random: Random) -> bytes:
    """`right` as YAML after one to three changes of its keys and values, and sometimes one of its bytes."""
    data = copy.deepcopy(right)
    for _ in range(random.randint(1, 3)):
        random.choice(CHANGES)(data, random)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=random.random() < 0.5).encode("utf-8", "surrogatepass")
    return random.choice(BYTES)(text, random) if random.random() < 0.3 else text


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every (mapping or list, key or index) in `data`."""
    if not isinstance(data, dict | list):
        return []
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    return [(data, key) for key in keys] + [place for key in keys for place in places(data[key])]


def _place(data: Data, random: Random, kinds: type | tuple[type, ...] = (dict, list)) -> tuple[Any, Any]:
    found = [place for place in places(data) if isinstance(place[0], kinds)]
    return random.choice(found) if found else ({}, None)


def _misspell(data: Data, random: Random) -> None:
    holder, key = _place(data, random, dict)
    if isinstance(key, str) and key:
        at = random.randrange(len(key))
        other = random.choice([key[:at] + key[at + 1 :], key[:at] + "x" + key[at:], key.upper(), key + "s", key[::-1]])
        holder[other] = holder.pop(key)


def _other_value(data: Data, random: Random) -> None:
    holder, key = _place(data, random)
    if key is not None:
        holder[key] = copy.deepcopy(random.choice(VALUES))


def _lose(data: Data, random: Random) -> None:
    holder, key = _place(data, random)
    if key is not None:
        del holder[key]


def _elsewhere(data: Data, random: Random) -> None:
    """A key, with what it holds, stands in another section."""
    holder, key = _place(data, random, dict)
    if key is None:
        return
    value = holder.pop(key)
    sections = [data, *(part[at] for part, at in places(data) if isinstance(part[at], dict))]
    random.choice(sections)[key] = value


def _more(data: Data, random: Random) -> None:
    sections = [data, *(part[at] for part, at in places(data) if isinstance(part[at], dict))]
    key = random.choice(["", "x", "dpo.beta", "a b", "é", "__class__", "\x07", 7, None, 1.5, True])
    random.choice(sections)[key] = copy.deepcopy(random.choice(VALUES))


def _nested(data: Data, random: Random) -> None:
    holder, key = _place(data, random)
    if key is not None:
        holder[key] = random.choice([[holder[key]], {"value": holder[key]}, {key: holder[key]}])


def _cut(text: bytes, random: Random) -> bytes:
    return text[: random.randrange(len(text) + 1)]


def _noise(text: bytes, random: Random) -> bytes:
    at = random.randrange(len(text) + 1)
    return text[:at] + bytes(random.randrange(256) for _ in range(random.randint(1, 8))) + text[at:]


def _line_twice(text: bytes, random: Random) -> bytes:
    lines = text.splitlines(keepends=True) or [b""]
    at = random.randrange(len(lines))
    return b"".join([*lines[: at + 1], *lines[at:]])


def _sign(text: bytes, random: Random) -> bytes:
    at = random.randrange(len(text) + 1)
    return (
        text[:at]
        + random.choice([b":", b"- ", b"\t", b"&a ", b"*a", b"!!", b"{", b"]", b"'", b"#", b"%", b"\n"])
        + text[at:]
    )


CHANGES: tuple[Callable[[Data, Random], None], ...] = (_misspell, _other_value, _lose, _elsewhere, _more, _nested)
BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (_cut, _noise, _line_twice, _sign)
