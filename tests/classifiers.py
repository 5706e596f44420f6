"""Small random sequence classifiers, saved as ordinary folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import byte_tokenizer


def save_classifier(folder: Path, *, tokens: tuple[str, ...] = (), **changes: Any) -> Path:
    """A random 2-layer BERT that reads bytes; `tokens` are added as special ones, `changes` go to its configuration.

    BERT attends in both directions, so that a wrong attention mask would show.
    """
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<cls>", "sep_token": "<sep>", "additional_special_tokens": [*tokens]})
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_labels": 1, "max_position_embeddings": 256, **changes}
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, initializer_range=0.3, **settings,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits_of(folder: Path, text: str) -> list[float]:
    """The classifier's outputs for `text`, by transformers itself: special tokens parsed, none added."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        values: list[float] = AutoModelForSequenceClassification.from_pretrained(folder)(ids).logits[0].tolist()
    return values
