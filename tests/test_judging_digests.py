"""What makes a judge another one: the digest that its kept answers, and a run's stages, go by."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from judging_parts import USER_MODULE, forgotten_imports, spec

from online_dpo.errors import JudgeError
from online_dpo.judging import judge_digest, load_judge

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def clean_imports() -> Iterator[None]:
    with forgotten_imports():
        yield


@pytest.fixture
def folder(tmp_path: Path, clean_imports: None) -> Path:
    (tmp_path / "vowel_judges.py").write_text(USER_MODULE)
    (tmp_path / "experiment.yaml").write_text("name: x\n")
    return tmp_path


def test_the_digest_follows_use_params_and_source_only(folder: Path) -> None:
    base = judge_digest(spec("vowel_judges:Vowels", weight=2, offset=1.0), [folder])
    assert judge_digest(spec("vowel_judges:Vowels", offset=1.0, weight=2), [folder]) == base, "order of keys"
    assert judge_digest(spec("vowel_judges:Vowels", weight=3, offset=1.0), [folder]) != base
    assert judge_digest(spec("vowel_judges:Duck", weight=2, offset=1.0), [folder]) != base
    (folder / "vowel_judges.py").write_text(USER_MODULE + "# changed\n")
    assert judge_digest(spec("vowel_judges:Vowels", weight=2, offset=1.0), [folder]) != base


def test_the_digest_does_not_construct(folder: Path) -> None:
    assert len(judge_digest(spec("vowel_judges:Angry"), [folder])) == 64


def test_the_digest_follows_the_code_that_a_function_judge_names(folder: Path) -> None:
    judge = spec("judges.function:FunctionJudge", function="vowel_judges:function")
    base = judge_digest(judge, [folder])
    (folder / "vowel_judges.py").write_text(USER_MODULE + "# changed\n")
    assert judge_digest(judge, [folder]) != base


@pytest.mark.parametrize("load", [load_judge, judge_digest])
def test_the_digest_needs_a_real_judge_too(folder: Path, load: Callable[..., object]) -> None:
    with pytest.raises(JudgeError, match="no module 'nowhere'"):
        load(spec("nowhere:Judge"), [folder])


MODULE = """
import json
from pathlib import Path
from typing import ClassVar
import {package}.words as words
from {package}.deep.numbers import ONE
from {package} import shared
import beside_{package}
from judges.length import LengthJudge
from online_dpo.judging import PointwiseJudge

class Judge(PointwiseJudge):
    file_params: ClassVar = ("model",)
    judge_params: ClassVar = ("inner",)
    neutral_params: ClassVar = ("batch_size",)
    data_files: ClassVar = (Path(__file__).with_name("template.txt"),)
    def __init__(self, model=None, inner=None, batch_size=1, weight=1.0):
        pass
    def score(self, prompt, candidates):
        from .late import weight
        return [weight] * len(candidates)
"""


@pytest.fixture
def project(tmp_path: Path, clean_imports: None) -> Iterator[Path]:
    """A user's package `own…` with a module beside it; no two tests share a name, so no import is remembered."""
    folder = tmp_path / "project"
    package = folder / "ownjudge"
    (package / "deep").mkdir(parents=True)
    for name, text in {
        "__init__.py": "from . import quiet\n",
        "quiet.py": "",
        "judge.py": MODULE.format(package="ownjudge"),
        "words.py": "from .more import *\n",
        "more.py": "WORD = 1\n",
        "late.py": "from ..nowhere import nothing\nweight = 1.0\n",
        "shared.py": "import ownjudge.words\n",
        "deep/__init__.py": "",
        "deep/numbers.py": "ONE = 1\n",
        "template.txt": "is it good?",
        "unused.py": "",
    }.items():
        (package / name).write_text(text)
    (folder / "beside_ownjudge.py").write_text("def f():\n    import beside_later\n")
    (folder / "beside_later.py").write_text("")
    (folder / "inner_ownjudge.py").write_text(USER_MODULE)
    (folder / "weights.bin").write_bytes(b"1")
    yield folder


OWN = "ownjudge.judge:Judge"


@pytest.mark.parametrize(
    "file",
    [
        "ownjudge/judge.py",
        "ownjudge/words.py",
        "ownjudge/more.py",
        "ownjudge/late.py",
        "ownjudge/shared.py",
        "ownjudge/__init__.py",
        "ownjudge/quiet.py",
        "ownjudge/deep/numbers.py",
        "ownjudge/template.txt",
        "beside_ownjudge.py",
        "beside_later.py",
        "inner_ownjudge.py",
        "weights.bin",
    ],
)
def test_whatever_decides_a_verdict_changes_the_digest(project: Path, file: str) -> None:
    judge = spec(OWN, model="weights.bin", inner={"use": "inner_ownjudge:Vowels", "weight": 1})
    before = judge_digest(judge, [project])
    assert judge_digest(judge, [project]) == before
    with (project / file).open("ab") as changed:
        changed.write(b"\n# changed\n")
    assert judge_digest(judge, [project]) != before


@pytest.mark.parametrize("file", ["ownjudge/unused.py", "experiment.yaml", "data/more.bin"])
def test_what_the_judge_does_not_rest_on_does_not(project: Path, file: str) -> None:
    before = judge_digest(spec(OWN), [project])
    (project / file).parent.mkdir(exist_ok=True)
    (project / file).write_text("changed = True\n")
    assert judge_digest(spec(OWN), [project]) == before


def test_settings_count_but_for_those_that_change_no_verdict(project: Path) -> None:
    base: dict[str, Any] = {"model": "weights.bin", "inner": {"use": "inner_ownjudge:Vowels", "weight": 1}}

    def of(**change: Any) -> str:
        return judge_digest(spec(OWN, **{**base, **change}), [project])

    same = of()
    assert of(batch_size=64) == of(actor={"gpus": 0.5}) == same
    assert of(inner={"use": "inner_ownjudge:Vowels", "weight": 1, "actor": {}}) == same
    others = [
        of(weight=2.0),
        of(model=None),
        of(model="org/a-model"),
        of(model="org/another"),
        of(inner=None),
        of(inner={"use": "inner_ownjudge:Vowels", "weight": 2}),
        of(inner={"use": "inner_ownjudge:Duck"}),
        of(inner=[{"use": "inner_ownjudge:Duck"}] * 2),
    ]
    assert len({same, *others}) == 1 + len(others)


SHOW = """
import sys
from pathlib import Path
from online_dpo.config import JudgeSpec
from online_dpo.judging import judge_digest
folder = Path(sys.argv[1])
params = {"model": str(folder / "weights.bin"), "inner": {"use": "inner_ownjudge:Vowels", "weight": 1}}
print(judge_digest(JudgeSpec.model_validate({"use": "ownjudge.judge:Judge", **params}), [folder]))
"""


def test_where_the_folder_lies_is_of_no_account(project: Path, tmp_path: Path) -> None:
    """The file is even named by its whole path. The copy sorts before the installed packages, the original after."""
    moved = tmp_path / "a" / "copy"
    shutil.copytree(project, moved, ignore=shutil.ignore_patterns("__pycache__"))
    (moved / ".venv" / "lib").mkdir(parents=True)
    (moved / ".venv" / "lib" / "json.py").write_text("")
    shown = {
        subprocess.run(
            [sys.executable, "-c", SHOW, str(where)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
        ).stdout
        for where in (project, moved)
    }
    assert len(shown) == 1
    assert len(shown.pop()) == 65


def test_a_model_folder_counts_by_its_contents(project: Path) -> None:
    model = project / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    before = judge_digest(spec(OWN, model="model"), [project])
    (model / "weights").write_text("1")
    assert judge_digest(spec(OWN, model="model"), [project]) != before


@pytest.mark.parametrize("broken", [b"def broken(:\n", b"x = '\0'\n", b"\xff\xfe\n", b"(" * 5000])
def test_a_neighbour_that_python_cannot_read_counts_by_its_bytes(project: Path, broken: bytes) -> None:
    """It is imported late, if ever: Python has not complained, and neither does the digest."""
    late = project / "ownjudge" / "late.py"
    late.write_bytes(broken)
    before = judge_digest(spec(OWN), [project])
    late.write_bytes(broken + b"# changed\n")
    assert judge_digest(spec(OWN), [project]) != before


def test_a_file_of_the_judges_own_that_is_missing_is_named_in_one_line(project: Path) -> None:
    (project / "ownjudge" / "template.txt").unlink()
    with pytest.raises(JudgeError, match=r"template\.txt, which a judge rests on, cannot be read: FileNotFoundError"):
        judge_digest(spec(OWN), [project])


def test_a_folder_beside_the_experiment_is_not_taken_for_an_installed_package(project: Path) -> None:
    """`json` beside the experiment is data; Python's own is what `import json` means, and is not followed."""
    before = judge_digest(spec(OWN), [project])
    (project / "json").mkdir()
    (project / "json" / "data.txt").write_text("x")
    assert judge_digest(spec(OWN), [project]) == before


def test_settings_that_json_cannot_hold_are_named_in_one_line(project: Path) -> None:
    with pytest.raises(JudgeError, match="its settings cannot be written as JSON"):
        judge_digest(spec(OWN, weight={1: 2, "a": 3}), [project])


def test_the_digest_of_a_heavy_judge_loads_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from online_dpo.config import JudgeSpec\n"
        "from online_dpo.judging import judge_digest\n"
        "judge_digest(JudgeSpec(use='judges.reward_model:RewardModelJudge', model='org/a-model'), [])\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "[]\n"
