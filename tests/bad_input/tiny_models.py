"""Models of some kilobytes with random weights, made once a process and copied into the folder of each case."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import byte_tokenizer, tiny_config

from online_dpo.models import quiet

CHAT = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role: ' + m.role) }}{% endif %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@functools.cache
def _store() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def kept(make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, once a process. Read only."""
    folder = _store() / f"{make.__module__}-{make.__qualname__}"
    folder.mkdir()
    with quiet():
        make(folder)
    return folder


def llama(folder: Path) -> None:
    """A 2-layer Llama with 259 tokens, one a byte, a context of 128, and no chat template."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bert(folder: Path) -> None:
    """An encoder: fills in masked words."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    BertForMaskedLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def t5(folder: Path) -> None:
    """An encoder with a decoder behind it."""
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def reward_model(folder: Path) -> None:
    """A Llama with one output in place of a language model's head."""
    from transformers import AutoModelForSequenceClassification

    config = tiny_config("llama", 259)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def sharded(folder: Path) -> None:
    """The Llama in several files with an index."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(kept(llama)).save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)


def adapter(folder: Path) -> None:
    """A LoRA adapter of the Llama."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(kept(llama))
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder)


def gpt2(folder: Path) -> None:
    """A 2-layer GPT-2: its linear layers are of a kind of their own, its head is its embedding."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(tiny_config("gpt2", 259)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def copy(make: Callable[[Path], None], target: Path) -> Path:
    """`kept(make)` copied to `target`, to be changed there."""
    shutil.copytree(kept(make), target)
    return target


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of the mapping in `file`; a value of None takes the key away."""
    data = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not None}), encoding="utf-8")
