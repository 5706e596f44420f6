"""What the source never does: unpickle, evaluate text, start a shell, render what it was given as a template."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    [*(ROOT / "online_dpo").rglob("*.py"), *(ROOT / "judges").glob("*.py"), *(ROOT / "experiments").rglob("*.py")]
)
MODULES = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "pty", "commands")
"""Never imported."""
BUILT_IN = ("eval", "exec", "compile", "__import__")
"""Never called by these bare names; `model.eval()` is another thing."""
CALLS = {
    "load": "torch.load, np.load, yaml.load, pickle.load: none of these",
    "loads": "json.loads alone",
    "full_load": "yaml",
    "unsafe_load": "yaml",
    "read_pickle": "pandas",
    "system": "a shell",
    "popen": "a shell",
    "getoutput": "a shell",
    "import_module": "judging.importing alone",
    "from_string": "jinja2: a template out of text",
    "Environment": "jinja2: the report's alone, which escapes",
    "Template": "judges.llm_prompts has one of its own, filled in one pass",
    "extractall": "an archive's names may lead elsewhere",
    "unpack_archive": "likewise",
    "all_gather_object": "pickles between the learner's own workers",
    "broadcast_object_list": "likewise",
}
ALLOWED = {
    ("online_dpo/judging/importing.py", "importlib.import_module"): "the one door for judges and losses by name",
    ("online_dpo/report/page.py", "Environment"): "autoescape, its templates come with the package",
    ("judges/llm_base.py", "Template"): "no jinja2: judges.llm_prompts.Template",
    ("judges/self_judge.py", "Template"): "likewise",
    ("online_dpo/backends/distributed.py", "dist.all_gather_object"): "between workers that one run started",
    ("online_dpo/backends/distributed.py", "dist.broadcast_object_list"): "likewise",
}
"""(file, call) -> why it may."""
HARMLESS = ("json.load", "json.loads")


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@functools.cache
def nodes_of(file: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def dangerous(file: Path) -> Iterator[tuple[str, str]]:
    """(file, call) of every import of `MODULES`, every call of `BUILT_IN`, every one of `CALLS` that is an imported
    module's or an imported name (`engine.load(policy)` is neither), and every one that names a shell."""
    nodes = nodes_of(file)
    known = set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((of(file), f"import {name}") for name in modules if name.partition(".")[0] in MODULES)
            known |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Call):
            name = called(node)
            imported = name.partition(".")[0] in known and name.rpartition(".")[2] in CALLS and name not in HARMLESS
            if name in BUILT_IN or imported:
                yield of(file), name
            if any(keyword.arg == "shell" for keyword in node.keywords):
                yield of(file), f"{name}(shell=)"


def test_nothing_dangerous_is_called_but_what_is_allowed_with_a_reason() -> None:
    found = {one for file in FILES for one in dangerous(file)}
    assert found - set(ALLOWED) == set()
    assert set(ALLOWED) - found == set(), "allowed, and no longer there"


def test_the_search_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_security_code.ROOT", tmp_path)
    file = tmp_path / "bad.py"
    file.write_text(
        "import pickle, torch\nfrom joblib import x\n"
        "torch.load('f')\npickle.loads(b'')\neval('1')\nmodel.eval()\nengine.load(1)\nimport os\nos.system('ls')\n"
        "import subprocess\nsubprocess.run('ls', shell=True)\nimport jinja2\njinja2.Template('x')\n",
        encoding="utf-8",
    )
    names = {name for _, name in dangerous(file)}
    assert names == {
        "import pickle", "import joblib", "torch.load", "pickle.loads", "eval", "os.system", "subprocess.run(shell=)",
        "jinja2.Template",
    }  # fmt: skip


def test_weights_are_asked_for_as_safetensors() -> None:
    """transformers falls back to pickles where it is not told; configurations and tokenizers are no weights."""
    loaded = []
    for file in FILES:
        for node in nodes_of(file):
            if not isinstance(node, ast.Call) or not called(node).endswith("from_pretrained"):
                continue
            owner = called(node).removesuffix(".from_pretrained")
            if owner in ("AutoConfig", "AutoTokenizer"):
                continue
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            loaded.append((of(file), owner))
            # A GGUF file of a package that is installed has no pickles; an adapter's folder was read by `read_policy`.
            safe = keywords.get("use_safetensors") == "True" or "gguf_file" in keywords or owner == "PeftModel"
            assert safe, (of(file), owner)
    assert len(loaded) >= 4


def test_no_code_of_a_model_is_trusted_by_default() -> None:
    """Every parameter and key called trust_remote_code is False where nobody says otherwise, and nowhere True."""
    for file in FILES:
        for node in nodes_of(file):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) != "True", of(file)
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "trust_remote_code" and node.value:
                assert ast.unparse(node.value) == "False", of(file)
            if isinstance(node, ast.FunctionDef):
                given = node.args
                pairs = [
                    *zip(given.args[len(given.args) - len(given.defaults) :], given.defaults, strict=True),
                    *zip(given.kwonlyargs, given.kw_defaults, strict=True),
                ]
                for argument, default in pairs:
                    if argument.arg == "trust_remote_code" and default is not None:
                        assert ast.unparse(default) == "False", of(file)
