"""Reads YAML as people write it by hand, and as a stranger may send it: every fault is one line with its place.

Nothing but plain data is made (a SafeLoader), no key stands twice, and what aliases stand for may not be more than
anyone writes: a few lines of aliases of aliases are else more values than a memory holds.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from online_dpo.errors import ConfigError

LARGEST = 8_000_000
"""Bytes of a file that is read."""
MOST_VALUES = 500_000
"""Values in a file, those that aliases stand for counted each time."""
TYPES = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}

SUFFIXES = (".yaml", ".yml")
KINDS = {"int": "number that can be read", "float": "number", "timestamp": "date", "bool": "truth value"}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which the same key twice is an error, and so is a value that its type cannot hold."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConfigError(f"line {_line(key_node)}: a key is one word or number, found {_type(key)}")
            if key in seen:
                raise ConfigError(f"key '{key!s:.80}' stands twice (line {_line(key_node)})")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As the parent's, but a date of month 13 or a number of 5,000 digits is a fault of the file."""
        try:
            return super().construct_object(node, deep=deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = KINDS.get(node.tag.rpartition(":")[2], "value of its type")
            raise ConfigError(f"line {_line(node)}: {_shown(node)} is no {kind}; in quotes it is text") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in YAML file `path`; `ConfigError` when there is none."""
    try:
        if path.is_dir():
            inside = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
            hint = f" (did you mean '{path / inside[0]}'?)" if inside else ""
            raise ConfigError(f"{path} is a folder; an experiment is a YAML file{hint}")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise ConfigError(f"no experiment file at {path}{_beside(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > LARGEST:
        raise ConfigError(f"{path} has more than {LARGEST:,} bytes; an experiment is a few lines of YAML")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} is not UTF-8 (line {line}): save it in that encoding") from None
    data = parse_yaml(text, str(path))
    if data is None:
        raise ConfigError(f"{path} is empty; an experiment is a mapping of keys (online-dpo init writes one)")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: an experiment is a mapping of keys, found {_type(data)}")
    return data


def parse_yaml(text: str, where: str) -> Any:
    """What YAML `text` holds; `ConfigError`, beginning with `where`, tells the fault and its line."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_bombs(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {_told(error, text)}") from error
    except RecursionError:
        raise ConfigError(f"{where} is nested too deep, or an alias holds itself") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _refuse_bombs(root: yaml.Node) -> None:
    """Count what is there when every alias is written out, without writing it out."""
    sizes: dict[int, int] = {}
    stack: list[tuple[yaml.Node, bool]] = [(root, False)]
    inside: set[int] = set()
    while stack:
        node, done = stack.pop()
        parts = _parts(node)
        if done:
            inside.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(part)] for part in parts)
            if sizes[id(node)] > MOST_VALUES:
                raise ConfigError(
                    f"line {_line(node)}: more than {MOST_VALUES:,} values, those of aliases counted each time"
                )
        elif id(node) not in sizes:
            inside.add(id(node))
            stack.append((node, True))
            for part in parts:
                if id(part) in inside:
                    raise ConfigError(f"line {_line(part)}: an alias stands for something that holds this alias itself")
                stack.append((part, False))


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _told(error: yaml.YAMLError, text: str) -> str:
    """Where, and what: the parser's own words on one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem is not None:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        begun = error.context_mark
        context = f" {error.context}" if error.context else ""
        since = f" that began in line {begun.line + 1}" if mark and begun and begun.line != mark.line else ""
        tabs = " (a tab: YAML is indented by spaces)" if "'\\t'" in error.problem else ""
        return " ".join(f"{place}{error.problem}{context}{since}{tabs}".split())
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: the character U+{ord(text[error.position]):04X} cannot stand in YAML"
    return " ".join(str(error).split())


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _shown(node: yaml.Node) -> str:
    return f"'{node.value:.40}{'…' * (len(node.value) > 40)}'" if isinstance(node, yaml.ScalarNode) else "this"


def _type(value: Any) -> str:
    return TYPES.get(type(value), type(value).__name__)


def _beside(path: Path) -> str:
    """`` (did you mean ...?)`` for the YAML file of the nearest name in the same folder."""
    try:
        names = {file.stem: file for file in sorted(path.parent.iterdir()) if file.suffix in SUFFIXES}
    except OSError:
        return ""
    close = difflib.get_close_matches(path.stem, names, n=1)
    return f" (did you mean '{names[close[0]]}'?)" if close else ""
