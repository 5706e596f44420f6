"""Strangers' text inside a request to a model: a candidate cannot leave the slot that it stands in.

Three things keep it there. Fields are filled in one pass, so that a candidate's own "{answer_b}" stays as it is
(`llm_prompts`). The lines around it carry a code, made from the text itself, that occurs in no text of the request.
And what a server's tokenizer would read as a special token (the end of a turn, a new role) is broken apart, visibly:
servers put the chat template around the text first and tokenise the whole afterwards.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

BARRED = r"<(?=[|｜][^\s<>]{0,80}>)|<(?=[^\s<>]{1,80}[|｜]>)"
"""<|im_end|>, <｜User｜>, and the newer <|turn> and <turn|>."""
TAGS = (
    r"<(?=/?(?:s|bos|eos|pad|unk|mask|cls|sep|sop|eop|eod|bos_token|eos_token|pad_token|start_of_turn|end_of_turn|"
    r"start_of_image|end_of_image|image_soft_token|image|end_of_utterance|end_of_text|think|thinking|tool_call|"
    r"tool_response|tool_calls|unused_?\d+|extra_id_?\d+|reserved_?\d+|system|user|assistant)>)|<(?=</?sys>>)"
)
"""Words in angle brackets that are special tokens of some family of models."""
BRACKETS = (
    r"\[(?=/?(?:inst|system_prompt|available_tools|tool_calls|tool_results|tool_content|args|call_id|think|prefix|"
    r"suffix|middle|img|img_break|img_end|gmask|smask|cls|sep|mask|pad|unk|bos|eos)\])"
)
"""The same in square brackets."""
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters other than tab and new line
    "\u202a-\u202e\u2066-\u2069"  # they turn the direction of what follows
    "\ud800-\udfff"  # lone surrogates: they cannot be sent as UTF-8
    "\U000e0000-\U000e007f]"  # invisible letters
)


class Slots:
    """Makes strangers' text harmless. `special` adds strings that a model's tokenizer reads as special tokens."""

    def __init__(self, special: Sequence[str] = ()) -> None:
        own = [f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in special]
        self.special = re.compile("|".join([BARRED, TAGS, BRACKETS, *own]), re.IGNORECASE)

    def neutral(self, text: str) -> str:
        r"""`text` with special tokens broken by a space ("< |im_end|>") and hidden characters written as "\u0000"."""
        plain = HIDDEN.sub(lambda found: f"\\u{ord(found.group()):04x}", text.replace("\r\n", "\n"))
        return self.special.sub(lambda found: found.group() + " ", plain)

    def fence(self, texts: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        """Each field's (label, text), made harmless, between two lines that carry the label and a code."""
        harmless = {field: (label, self.neutral(text)) for field, (label, text) in texts.items()}
        all_texts = [text for _, text in harmless.values()]
        fenced = {}
        for field, (label, text) in harmless.items():
            code = code_of(text, all_texts)
            fenced[field] = f"----- begin {label} {code} -----\n{text}\n----- end {label} {code} -----"
        return fenced


def code_of(text: str, texts: Sequence[str]) -> str:
    """A code of 16 hexadecimal digits made from `text` that none of `texts` contains.

    Nobody can write a text that holds the hash of itself. And what stands beside a text does not change its code: both
    orders of a comparison differ by the order alone, and a server that keeps the beginning that requests have in common
    reads a prompt's messages once for all its comparisons.
    """
    hasher = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    while True:
        code = hasher.hexdigest()[:16]
        if not any(code in other.lower() for other in texts):
            return code
        hasher.update(b"again")
