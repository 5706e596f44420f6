"""Engine and learner as a run starts them, for benchmarks that work with a live engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from online_dpo.backends.factory import Backends, start_backends
from online_dpo.config import Experiment, validate_experiment
from online_dpo.models import load_tokenizer, resolve_model
from online_dpo.prompts import encode
from online_dpo.types import Message, Policy, Prompt

PROBE_TEXT = "There was a little girl named Lily who lived by the sea and liked to draw what she saw."


@dataclass(frozen=True)
class Live:
    """Live backends and what they were started with; `initial` has its probe."""

    backends: Backends
    experiment: Experiment
    initial: Policy
    max_model_len: int


@contextmanager
def live(model: str, max_model_len: int) -> Iterator[Live]:
    """Backends with vLLM as the engine."""
    experiment = validate_experiment(
        {
            "name": "benchmark",
            "model": model,
            "prompts": {"path": "none"},
            "judge": "judges.length:LengthJudge",
            "engine": "vllm",
        },
        "benchmark",
    )
    found = resolve_model(model)
    bare = Policy("initial", found.path, found.digest)
    ids = load_tokenizer(found.path)(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    with start_backends(experiment, bare, probe_token_ids=ids, max_model_len=max_model_len, say=_say) as backends:
        probe = backends.learner.probe(bare, ids)
        yield Live(backends, experiment, Policy(bare.id, bare.path, bare.digest, probe=probe), max_model_len)


def prompts_of(questions: list[str], folder: Path) -> list[Prompt]:
    """Questions as a run tokenises them: by the chat template, where the model has one."""
    tokenizer = load_tokenizer(folder)
    chats = [(Message("user", text),) for text in questions]
    return [Prompt(f"q{number}", chat, encode(chat, tokenizer)) for number, chat in enumerate(chats)]


def _say(line: str) -> None:
    print(f"# {line}", file=sys.stderr)
