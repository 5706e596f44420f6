"""What a model folder's config.json and generation_config.json say. Reads JSON alone: no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from online_dpo.errors import ModelError, one_line

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
"""What architectures call the length of their context in config.json."""
STRETCHED = ("linear", "dynamic", "yarn")
"""Kinds of rotary embedding whose `factor` makes the context longer than config.json says."""


def read_config(path: Path, name: str = "config.json") -> dict[str, Any]:
    """The mapping in file `name` of model folder `path`; empty where there is none.

    Raises `ModelError` when it cannot be read or is no mapping.
    """
    file = path / name
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: a mapping of keys is expected, found {type(found).__name__}")
    return found


def end_token_ids(path: Path) -> tuple[int, ...]:
    """The tokens that end an answer: generation_config.json's, else config.json's `eos_token_id`.

    Empty for a model that names none (every answer then runs to max_tokens). Raises `ModelError` where it is neither a
    token's number nor a list of them, or no such token is in the vocabulary.
    """
    for name in ("generation_config.json", "config.json"):
        value = read_config(path, name).get("eos_token_id")
        if value is None:
            continue
        ends = value if isinstance(value, list) else [value]
        if not ends or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
            raise ModelError(
                f"{path / name}: eos_token_id must be a token's number or a list of them, found {value!r:.80}"
            )
        known = vocabulary_size(path)
        if known is not None and not any(0 <= end < known for end in ends):
            raise ModelError(
                f"{path / name}: eos_token_id is {value}, and the model has the tokens 0 to {known - 1} alone"
            )
        return tuple(ends)
    return ()


def vocabulary_size(path: Path) -> int | None:
    """How many tokens the model in folder `path` has numbers for, by its config.json; None where it does not say."""
    return _whole(read_config(path), ("vocab_size",))


def context_length(path: Path) -> int | None:
    """The most tokens that the model in folder `path` was made for, by its config.json; None where it does not say."""
    config = read_config(path)
    found = _whole(config, CONTEXT_KEYS)
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if found is None or not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in STRETCHED:
        return found
    factor, original = rope.get("factor", 1.0), rope.get("original_max_position_embeddings", found)
    whole = all(isinstance(value, int | float) for value in (factor, original))
    return max(found, int(original * factor)) if whole else found


def _whole(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((int(config[key]) for key in keys if isinstance(config.get(key), int) and config[key] > 0), None)
