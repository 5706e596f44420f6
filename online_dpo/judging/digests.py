"""The digest of a judge: everything that decides its verdicts and is known before it is asked."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from online_dpo.config import JudgeSpec
from online_dpo.errors import JudgeError
from online_dpo.files import digest
from online_dpo.judging.loading import find_file, inner_specs, judge_class


def judge_digest(spec: JudgeSpec, folders: Sequence[Path]) -> str:
    """SHA-256 (hex) over `use`, the constructor keys that decide verdicts, the judge's source and files.

    Source: its module, the modules that this one imports from the same package or from `folders`, and those named by
    `code_params`. Files: what `file_params` name, and `data_files`. Judges inside count with their own digests.
    The judge is imported, not constructed. Raises `JudgeError` as `load_judge` does.
    """
    kind = judge_class(spec, folders)
    inner = set(getattr(kind, "judge_params", ()))
    neutral = set(getattr(kind, "neutral_params", ()))
    params = {key: value for key, value in spec.params.items() if key not in inner | neutral}
    code = [spec.use, *_named(spec.params, getattr(kind, "code_params", ()))]
    parts = [
        spec.use,
        params,
        [_source_digest(name, folders) for name in code],
        [_path_digest(name, folders) for name in _named(spec.params, getattr(kind, "file_params", ()))],
        [digest(Path(file)) for file in getattr(kind, "data_files", ())],
        {
            key: [judge_digest(one, folders) for one in inner_specs(spec, key)]
            for key in sorted(inner)
            if spec.params.get(key) is not None
        },
    ]
    try:
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    except (TypeError, ValueError) as error:
        raise JudgeError(f"judge '{spec.use}': its settings cannot be written as JSON: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def _named(params: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """What `keys` name in `params`; a key may hold a list of names."""
    values = [params[key] for key in keys if params.get(key) is not None]
    return [str(name) for value in values for name in (value if isinstance(value, list) else [value])]


def _path_digest(name: str, folders: Sequence[Path]) -> str:
    """The digest of a file or folder; a name that is neither (a hub id) stands for itself."""
    found = Path(find_file(name, folders))
    return digest(found) if found.exists() else name


def _source_digest(name: str, folders: Sequence[Path]) -> str:
    """The digest of the source that "module:name" rests on; empty where Python has none (a built-in module)."""
    files = sorted({file.resolve() for file in _sources(name.partition(":")[0], folders, set())})
    return hashlib.sha256("".join(digest(file) for file in files).encode()).hexdigest()


def _sources(module: str, folders: Sequence[Path], seen: set[str]) -> Iterator[Path]:
    """The source file of `module`, and of what it imports from its own package or from `folders`."""
    if module in seen:
        return
    seen.add(module)
    file = _file_of(module)
    if file is None:
        return
    yield file
    package = module.partition(".")[0]
    for name in _imports(file, module):
        found = _file_of(name)
        if found is None:
            continue
        beside = any(found.resolve().is_relative_to(folder.resolve()) for folder in folders)
        if name.partition(".")[0] == package or beside:
            yield from _sources(name, folders, seen)


def _file_of(module: str) -> Path | None:
    try:
        loaded = sys.modules.get(module)
        spec = getattr(loaded, "__spec__", None) or importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # no such module: "from x import y" names y, no module
        return None
    origin = getattr(spec, "origin", None)
    return Path(origin) if origin and origin.endswith(".py") and Path(origin).is_file() else None


def _imports(file: Path, module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
