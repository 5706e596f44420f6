"""Templates of requests to a model: plain text with named fields, filled in one pass."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

from online_dpo.errors import JudgeError, nearest
from online_dpo.types import Prompt

SECTIONS = ("system", "user", "reasoning", "verdict")
SECTION = re.compile(r"^=== *(\w+) *===[ \t]*$", re.MULTILINE)
FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}|[{}]")
Chat: TypeAlias = list[dict[str, str]]
"""Messages as the chat endpoint takes them: role and content."""


def own_template(name: str) -> Path:
    """The template of that name which comes with the judges."""
    return Path(str(files("judges") / "templates" / f"{name}.txt"))


@dataclass(frozen=True, slots=True)
class Filled:
    """One request's texts. `verdict` is the last thing asked; `reasoning` what is asked before, if anything."""

    system: str
    user: str
    reasoning: str
    verdict: str

    def first(self, *, reasoning: bool) -> Chat:
        """The first request: for the verdict, or for the reasoning that goes before it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        last = self.reasoning if reasoning else self.verdict
        return [*system, {"role": "user", "content": f"{self.user}\n\n{last}"}]

    def second(self, reasoned: str) -> Chat:
        """The second request: the verdict, after what the model `reasoned`."""
        answer = {"role": "assistant", "content": reasoned}
        return [*self.first(reasoning=True), answer, {"role": "user", "content": self.verdict}]


class Template:
    """A file of sections "=== system ===" (may be left out), user, reasoning (where the model reasons) and verdict.

    What stands above the first section is a note to the reader. {field} is filled in; {{ and }} are braces. `slots`
    are the fields of strangers' texts: each must occur in `user`, where it stands between two lines with a code.
    `plain` are the others; those in `needed` must occur somewhere. Raises `JudgeError`, one line, for what is wrong.
    """

    def __init__(
        self,
        path: Path,
        *,
        slots: Collection[str],
        plain: Collection[str],
        needed: Collection[str] = (),
        reasoning: bool = False,
    ) -> None:
        self.path = path
        self.slots = frozenset(slots)
        self.sections = self._read()
        for name in ("user", "verdict", *(["reasoning"] if reasoning else [])):
            if not self.sections.get(name):
                raise self._wrong(f"section '=== {name} ===' is missing or empty")
        self._check_fields({*slots, *plain}, needed)

    def fill(self, texts: Mapping[str, str], plain: Mapping[str, str]) -> Filled:
        """The request with `texts`, fenced already, and `plain` values in their fields."""
        values = {**plain, **texts}

        def value(found: re.Match[str]) -> str:
            return values[found[1]] if found[1] else found[0][0]

        filled = {name: FIELD.sub(value, self.sections.get(name, "")) for name in SECTIONS}
        return Filled(**filled)

    def _read(self) -> dict[str, str]:
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise self._wrong(f"cannot be read: {error}") from error
        _, *parts = SECTION.split(text)
        sections: dict[str, str] = {}
        for name, body in zip(parts[::2], parts[1::2], strict=True):
            if name not in SECTIONS:
                raise self._wrong(f"unknown section '{name}'{nearest(name, SECTIONS)}")
            if name in sections:
                raise self._wrong(f"section '{name}' stands there twice")
            sections[name] = body.strip()
        return sections

    def _check_fields(self, known: Collection[str], needed: Collection[str]) -> None:
        found: set[str] = set()
        for section, text in self.sections.items():
            for match in FIELD.finditer(text):
                name = match[1]
                if match[0] in ("{", "}"):
                    raise self._wrong(f"section '{section}' has a single '{match[0]}': write it twice for a brace")
                if name and name not in known:
                    hint = nearest(name, known) or f"; known: {', '.join(sorted(known))}"
                    raise self._wrong(f"unknown field '{{{name}}}'{hint}")
                if name in self.slots and section != "user":
                    raise self._wrong(f"field '{{{name}}}' belongs into section 'user', not '{section}'")
                found.update([name] if name else [])
        for name in sorted({*self.slots, *needed} - found):
            raise self._wrong(f"field '{{{name}}}' is missing")

    def _wrong(self, what: str) -> JudgeError:
        return JudgeError(f"template '{self.path}': {what}")


def conversation(prompt: Prompt) -> str:
    """The prompt's messages as one text; who said what only where there are several."""
    if len(prompt.messages) == 1:
        return prompt.text
    return "\n\n".join(f"({message.role})\n{message.content}" for message in prompt.messages)
