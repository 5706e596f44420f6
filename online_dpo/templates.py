"""Which chat template writes prompts: the tokenizer's own, HH-RLHF's plain dialogues, or a file of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from online_dpo.errors import DataError, nearest

DIALOGUE = "dialogue"
DIALOGUE_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '\\n\\nHuman: ' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '\\n\\nAssistant: ' + message.content }}"
    "{% elif message.role == 'system' and loop.first %}{{ message.content }}"
    "{% else %}{{ raise_exception('a dialogue has turns of user and assistant, and a system message only first') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
"""Turns of "Human:" and "Assistant:" with an empty line before each (Bai et al. 2022)."""


def use_template(tokenizer: Any, template: str | None, folders: Sequence[Path] = ()) -> Any:
    """`tokenizer` with the chat template that `prompts.template` names, set in place; None leaves its own.

    "dialogue", or the path of a Jinja file, searched in `folders` and then in the current folder. The dialogue begins
    with the begin token where the tokenizer puts it before plain text. Raises `DataError` when there is no such file.
    """
    if template == DIALOGUE:
        begin = "{{ bos_token }}" if _adds_begin(tokenizer) else ""
        tokenizer.chat_template = begin + DIALOGUE_TEMPLATE
    elif template is not None:
        tokenizer.chat_template = _read(template, folders)
    return tokenizer


def _adds_begin(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]


def _read(template: str, folders: Sequence[Path]) -> str:
    path = Path(template).expanduser()
    for base in (*folders, Path.cwd()):
        if (base / path).is_file():
            try:
                return (base / path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"prompts.template: {template} cannot be read: {error}") from error
    near = [DIALOGUE, *(file.name for base in (*folders, Path.cwd()) for file in sorted(base.glob("*.jinja*")))]
    raise DataError(f'prompts.template: no file {template}{nearest(template, near)}; or the word "{DIALOGUE}"')
