"""From "module:name" to the object: from the Python path, or from beside the experiment."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from online_dpo.errors import JudgeError, nearest, one_line


def import_object(name: str, folders: Sequence[Path] = (), what: str = "judge") -> Any:
    """The object named "module:name", imported from the Python path or `folders`; `JudgeError` when there is none."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute.isidentifier():
        raise JudgeError(f"{what} '{name}': write it as \"module:name\"")
    module = _import_module(module_name, folders, f"{what} '{name}'")
    if not hasattr(module, attribute):
        raise JudgeError(
            f"{what} '{name}': module '{module_name}' has no '{attribute}'{_other_names(module, attribute)}"
        )
    return getattr(module, attribute)


def _import_module(name: str, folders: Sequence[Path], asked: str) -> ModuleType:
    root = name.partition(".")[0]
    # Before `folders` are searched: on the path, a folder `judges` beside an experiment hides an editable installation.
    with contextlib.nullcontext() if root == "judges" else contextlib.suppress(JudgeError):
        _check_judges_package(asked)
    _search_in(folders)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise JudgeError(f"{asked}: no module '{name}'{nearest(name, _siblings(name, folders))}") from error
        raise JudgeError(f"{asked}: module '{name}' needs '{error.name}', which is not installed") from error
    except (Exception, SystemExit) as error:  # a script that ends with sys.exit() would end the whole program
        raise JudgeError(f"{asked}: module '{name}' cannot be imported: {one_line(error)}") from error
    if root != "judges":
        _check_not_hidden(module, name, folders, asked)
    return module


def _search_in(folders: Sequence[Path]) -> None:
    """Put `folders` last on sys.path, once each, for good: a user's judge may import its neighbours later.

    Last, so that a file beside an experiment never takes the place of an installed package.
    """
    for folder in folders:
        path = str(folder.resolve())
        if path not in sys.path:
            sys.path.append(path)
    importlib.invalidate_caches()


def _check_judges_package(asked: str) -> None:
    """Another project on PyPI also installs a package `judges`: tell it from ours by our marker."""
    try:
        package = importlib.import_module("judges")
    except ModuleNotFoundError as error:
        if error.name == "judges":
            raise JudgeError(f"{asked}: online-dpo's package 'judges' is not installed") from error
        package = None  # ours imports nothing, so a package that lacks something is the other one
    except Exception:  # likewise: ours cannot fail to import
        package = None
    if package is None or getattr(package, "ONLINE_DPO", None) is not True:
        where = f" ({package.__file__})" if package is not None and getattr(package, "__file__", None) else ""
        raise JudgeError(
            f"{asked}: the 'judges' that Python finds{where} is not online-dpo's; another project on PyPI has "
            f"the same name: uninstall it or use a separate environment"
        )


def _check_not_hidden(module: ModuleType, name: str, folders: Sequence[Path], asked: str) -> None:
    """A file beside the experiment must not be passed over silently for a like-named module elsewhere."""
    stem = Path(*name.split("."))
    for folder in folders:
        for file in (folder / stem / "__init__.py", folder / f"{stem}.py"):
            if file.is_file():
                loaded = getattr(module, "__file__", None)
                if loaded is None or Path(loaded).resolve() != file.resolve():
                    raise JudgeError(f"{asked}: {file} is hidden by {loaded or 'a built-in module'}: rename it")
                return


def _siblings(name: str, folders: Sequence[Path]) -> list[str]:
    """The modules that `name` may have been meant to be: its package's, or those in `folders`."""
    parent = name.rpartition(".")[0]
    paths = getattr(sys.modules.get(parent), "__path__", ()) if parent else folders
    prefix = f"{parent}." if parent else ""
    return [prefix + module.name for module in pkgutil.iter_modules([str(path) for path in paths])]


def _other_names(module: ModuleType, wanted: str) -> str:
    """The name in `module` nearest to `wanted`, else all that the module itself defines."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    return nearest(wanted, own) or (f"; it has: {', '.join(own)}" if own else "")
