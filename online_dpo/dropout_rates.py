"""What a model's configuration says of dropout."""

from __future__ import annotations

from pathlib import Path

OTHER_HEADS = ("summary", "classif")
"""Configurations name rates of heads that a causal language model does not have."""


def is_rate(name: str) -> bool:
    """Whether a configuration's key of this name is a dropout rate that a causal language model reads."""
    return "drop" in name and not any(head in name for head in OTHER_HEADS)


def has_dropout(model: Path, trust_remote_code: bool = False) -> bool:
    """Whether the configuration of the model in a folder, defaults included, has a dropout rate above 0."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, local_files_only=True)
    return any(is_rate(name) and isinstance(value, float) and value > 0 for name, value in vars(config).items())
