"""Llama models of any shape with random weights, saved as folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SMOLLM2_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
"""Layers of SmolLM2-135M."""
LLAMA_1B_SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
"""Layers of Llama 3.2 1B; 16 of them and its vocabulary of 128256 make 1.24 billion weights."""
TINY_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
"""Small; heads of a size that vLLM's attention on CPU knows."""


def save_llama(
    folder: Path,
    shape: dict[str, int],
    layers: int,
    vocabulary: int,
    *,
    tokenizer_of: Path | None = None,
    tied: bool = True,
) -> Path:
    """A float32 Llama in `folder`, with the tokenizer of another model where one is needed."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    config = LlamaConfig(
        **shape,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in [tokenizer_of / name for name in TOKENIZER_FILES] if tokenizer_of is not None else []:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    return folder


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes beside the model: TRL's trainer will not be made without one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
