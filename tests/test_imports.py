"""The walls of the house: who may import whom, and what must stay light.

Two kinds of check: the source's import statements by `ast` (a file that does not exist fails by name), and what a
fresh interpreter really loaded.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "online_dpo"
JUDGES = sorted((ROOT / "judges").glob("*.py"))
HEAVY = ("torch", "ray", "vllm", "transformers", "peft", "datasets", "pyarrow", "accelerate")
BACKEND = "online_dpo.backends"


def imported(file: Path) -> Iterator[tuple[str, bool]]:
    """Every module that `file` imports, and whether it does so as the file is loaded (not inside a function).

    What stands under `if TYPE_CHECKING:` is left out: it is never carried out.
    """
    yield from _walk(ast.parse(file.read_text(encoding="utf-8")), file, at_load=True)


def _walk(node: ast.AST, file: Path, *, at_load: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, at_load) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = _absolute(child, file)
            # `from package import module` may import a module of that name too.
            yield from ((name, at_load) for name in (module, *(f"{module}.{alias.name}" for alias in child.names)))
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _walk(child, file, at_load=at_load and not inside)


def _absolute(node: ast.ImportFrom, file: Path) -> str:
    if not node.level:
        return node.module or ""
    package = file.relative_to(ROOT).with_suffix("").parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def modules(file: Path) -> set[str]:
    """The modules that `file` imports anywhere."""
    return {module for module, _ in imported(file)}


def belongs(module: str, *packages: str) -> bool:
    """Whether `module` is one of `packages` or inside one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def top(module: str) -> str:
    return module.partition(".")[0]


def files_of(name: str) -> list[Path]:
    """The source of core module or package `name`; a name that is neither fails when it is read."""
    return sorted((CORE / name).glob("*.py")) or [CORE / f"{name}.py"]


def core_files() -> list[Path]:
    return sorted(CORE.rglob("*.py"))


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after `statement`."""
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["online_dpo.cli", "online_dpo.config", "online_dpo.display"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    loaded = {top(name) for name in loaded_by(f"import {module}")}
    assert not loaded & set(HEAVY)


def test_judges_package_loads_nothing_heavy() -> None:
    assert not {top(name) for name in loaded_by("import judges")} & set(HEAVY)


@pytest.mark.parametrize("file", JUDGES, ids=lambda file: file.name)
def test_judges_know_types_errors_judging_and_measure_alone(file: Path) -> None:
    own = {module for module in modules(file) if top(module) == "online_dpo"} - {"online_dpo"}
    allowed = ("online_dpo.types", "online_dpo.errors", "online_dpo.judging", "online_dpo.measure")
    assert all(belongs(module, *allowed) for module in own), own


def test_there_are_judges() -> None:
    assert {"length.py", "sentiment.py"} <= {file.name for file in JUDGES}


def test_losses_import_torch_alone() -> None:
    others = {top(module) for module in modules(CORE / "losses.py")} - set(sys.stdlib_module_names)
    assert others == {"torch"}


def test_loss_modifiers_import_torch_and_losses_alone() -> None:
    others = {m for m in modules(CORE / "loss_modifiers.py") if top(m) not in sys.stdlib_module_names}
    assert all(belongs(module, "torch", "online_dpo.losses") for module in others), others


@pytest.mark.parametrize("file", sorted((CORE / "planner").glob("*.py")), ids=lambda file: file.name)
def test_the_planner_knows_no_backend(file: Path) -> None:
    """It reads configurations and records; what runs in a rehearsal comes through `runs`, as in a run."""
    assert not any(belongs(module, BACKEND, *HEAVY) for module in modules(file))


@pytest.mark.parametrize("name", ["objective", "custom_loss"])
def test_the_objective_knows_no_backend(name: str) -> None:
    found = modules(CORE / f"{name}.py")
    assert not any(belongs(module, BACKEND, "ray", "vllm", "transformers", "peft") for module in found)


@pytest.mark.parametrize("name", ["learner.py", "hf_engine.py"])
def test_learner_and_transformers_engine_know_no_ray(name: str) -> None:
    found = modules(CORE / "backends" / name)
    assert not any(belongs(module, "ray", f"{BACKEND}.ray_cluster") for module in found)


def test_loop_knows_no_backend() -> None:
    found = modules(CORE / "loop.py")
    assert not any(belongs(module, BACKEND, *HEAVY) for module in found)


@pytest.mark.parametrize("file", core_files(), ids=lambda file: str(file.relative_to(CORE)))
def test_core_never_imports_judges(file: Path) -> None:
    assert not any(belongs(module, "judges") for module in modules(file))


@pytest.mark.parametrize(
    "name", ["types", "errors", "config", "protocols", "pairing", "judging", "store", "measure", "loop", "display"]
)
def test_core_modules_load_no_backend_library(name: str) -> None:
    at_load = {module for file in files_of(name) for module, now in imported(file) if now}
    assert not any(belongs(module, "torch", "ray", "vllm", "transformers", "peft", BACKEND) for module in at_load)


def test_lower_modules_know_no_higher_ones() -> None:
    higher = ("online_dpo.loop", "online_dpo.cli", "online_dpo.runs", BACKEND)
    for name in ("types", "errors", "config", "judging", "pairing", "losses", "store", "measure", "display"):
        found = {m for file in files_of(name) for m in modules(file) if belongs(m, *higher)}
        assert not found, (name, found)


def test_the_checks_see_what_they_should(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "import ray.util as util\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def lazy():\n    from vllm import LLM\n",
        encoding="utf-8",
    )
    found = dict(imported(file))
    assert found["ray.util"] is True
    assert found["vllm.LLM"] is False
    assert "torch" not in found
