"""The digest of a judge: everything that decides its verdicts and is known before it is asked."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from online_dpo.config import JudgeSpec
from online_dpo.errors import JudgeError, one_line
from online_dpo.files import digest
from online_dpo.judging.loading import find_file, inner_specs, judge_class

BUILT_IN = "judges"
"""The package of the built-in judges: one that a user's judge is made from changes with the version."""


def judge_digest(spec: JudgeSpec, folders: Sequence[Path]) -> str:
    """SHA-256 (hex) over `use`, the constructor keys that decide verdicts, the judge's source and files.

    Source: its module, the modules that this one imports from the same package, from `folders` or from the built-in
    judges, and those named by `code_params`; installed packages are not part of it. Files: what `file_params` name
    (by their last name and contents, wherever they lie), and `data_files`. Judges inside count with their own
    digests. The judge is imported, not constructed. Raises `JudgeError` as `load_judge` does.
    """
    kind = judge_class(spec, folders)
    inner = set(getattr(kind, "judge_params", ()))
    neutral = set(getattr(kind, "neutral_params", ()))
    files = set(getattr(kind, "file_params", ()))
    params = {key: value for key, value in spec.params.items() if key not in inner | neutral | files}
    code = [spec.use, *_named(spec.params, getattr(kind, "code_params", ()))]
    parts = [
        spec.use,
        params,
        [source_digest(name, folders) for name in code],
        {key: [_path_digest(name, folders) for name in _named(spec.params, [key])] for key in sorted(files)},
        [_file_digest(Path(file)) for file in getattr(kind, "data_files", ())],
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


def _path_digest(name: str, folders: Sequence[Path]) -> list[str]:
    """The last name and the digest of a file or folder; a name that is neither (a hub id) stands for itself."""
    found = Path(find_file(name, folders))
    return [found.name, _file_digest(found)] if found.is_absolute() and found.exists() else [name]


def source_digest(name: str, folders: Sequence[Path]) -> list[tuple[str, str]]:
    """The modules that "module:name" rests on, each with its file's digest. None that Python has no source of.

    By module names: where the files lie is of no account.
    """
    found: dict[str, Path] = {}
    _collect(name.partition(":")[0], [folder.resolve() for folder in folders], found)
    return sorted((module, _file_digest(file)) for module, file in found.items())


def _collect(module: str, folders: Sequence[Path], found: dict[str, Path]) -> None:
    """Add `module`, and what it imports from its own package, from `folders` and from the built-in judges."""
    file = _file_of(module)
    if file is None or module in found:
        return
    found[module] = file
    for name in _imports(file, module):
        package = name.partition(".")[0]
        if package in (module.partition(".")[0], BUILT_IN) or _lies_in(package, folders):
            _collect(name, folders, found)


def _lies_in(package: str, folders: Sequence[Path]) -> bool:
    """Whether Python finds top-level `package` in `folders` itself (a virtual environment may lie below them)."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    places = [*(spec.submodule_search_locations or []), spec.origin] if spec is not None else []
    wanted = [where for folder in folders for where in (folder / package, folder / f"{package}.py")]
    return any(place is not None and Path(place).resolve() in wanted for place in places)


def _file_of(module: str) -> Path | None:
    """The source of `module`. Nothing is imported for it: a judge may import heavy packages late."""
    package, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # no such module, or one that is made at run time
        return None
    if spec is None:
        return None
    if not parts:
        file = Path(spec.origin) if spec.origin else None
        return file if file is not None and file.suffix == ".py" and file.is_file() else None
    for folder in spec.submodule_search_locations or []:
        stem = Path(folder, *parts)
        for file in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")):
            if file.is_file():
                return file
    return None  # "from x import y": y is a name in x, no module


def _imports(file: Path, module: str) -> Iterator[str]:
    """What `file` says it imports, wherever it says so; nothing where Python cannot read it (it may never have to)."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    own = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = own[: len(own) - node.level + 1] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def _file_digest(path: Path) -> str:
    try:
        path.stat()  # `digest` takes what is not there for an empty folder
        return digest(path)
    except OSError as error:
        raise JudgeError(f"{path}, which a judge rests on, cannot be read: {one_line(error)}") from error
