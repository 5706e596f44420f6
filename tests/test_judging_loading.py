"""From "module:Class" in an experiment to a judge, and what is said where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judging_parts import PROMPTS, USER_MODULE, answer, forgotten_imports, item, spec

from online_dpo.errors import JudgeError
from online_dpo.judging import (
    AskedJudge,
    Asking,
    Opinion,
    PointwiseJudge,
    VerdictCache,
    asks_policy,
    compares,
    judge_all,
    judge_digest,
    judge_name,
    load_judge,
    open_judge,
)
from online_dpo.types import Verdict


@pytest.fixture
def clean_imports() -> Iterator[None]:
    with forgotten_imports():
        yield


@pytest.fixture
def folder(tmp_path: Path, clean_imports: None) -> Path:
    (tmp_path / "vowel_judges.py").write_text(USER_MODULE)
    (tmp_path / "experiment.yaml").write_text("name: x\n")
    return tmp_path


def test_a_user_module_beside_the_yaml_is_found(folder: Path) -> None:
    judge = load_judge(spec("vowel_judges:Vowels", weight=2), [folder])
    results = judge_all(judge, PROMPTS, [answer("p", 0, "aeb")], max_abstain=0)
    assert results == [Verdict("p", 0, 4.0)]
    load_judge(spec("vowel_judges:Vowels", weight=2), [folder])
    assert sys.path.count(str(folder.resolve())) == 1
    assert sys.path[-1] == str(folder.resolve()), "a user's folder never comes before installed packages"


@pytest.mark.parametrize(("name", "expected"), [("Duck", 1.0), ("DuckPair", 0.0)])
def test_duck_typed_judges_are_accepted(folder: Path, name: str, expected: float) -> None:
    """DuckPair always says .75 for the first: (.75 + 1 - .75)/2 = .5, a tie: strength 0."""
    judge = load_judge(spec(f"vowel_judges:{name}"), [folder])
    assert judge_name(judge) == f"vowel_judges:{name}"
    results = judge_all(judge, PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=0)
    assert [v.score for v in results if isinstance(v, Verdict)] == [expected, expected]


@pytest.mark.parametrize(
    ("use", "params", "message"),
    [
        ("vowel_judge:Vowels", {}, "no module 'vowel_judge' (did you mean 'vowel_judges'?)"),
        ("no.such.module:Judge", {}, "no module 'no.such.module'"),
        ("vowel_judges.deeper:Judge", {}, "no module 'vowel_judges.deeper'"),
        ("judges.lenght:LengthJudge", {}, "no module 'judges.lenght' (did you mean 'judges.length'?)"),
        ("vowel_judges:Vowel", {}, "module 'vowel_judges' has no 'Vowel' (did you mean 'Vowels'?)"),
        ("vowel_judges:Zzz", {}, "has no 'Zzz'; it has: Vowels, Duck"),
        ("vowel_judges:Vowels", {"weigth": 1}, "unknown key 'weigth' (did you mean 'weight'?)"),
        ("vowel_judges:Vowels", {"zzz": 1}, "unknown key 'zzz'; known: weight, offset"),
        ("vowel_judges:Duck", {"zzz": 1}, "unknown key 'zzz'; it takes no keys"),
        ("vowel_judges:Vowels", {"offset": 1}, "key 'weight' is missing"),
        ("vowel_judges:Neither", {}, "is not a judge"),
        ("vowel_judges:Both", {}, "has both 'score' and 'prefer'"),
        ("vowel_judges:Empty", {}, "does not define 'score'"),
        ("vowel_judges:EmptyPair", {}, "does not define 'prefer'"),
        ("vowel_judges:Angry", {}, "cannot be constructed: RuntimeError: no licence"),
        ("vowel_judges:function", {}, "is a function, not a class; write use: judges.function:FunctionJudge"),
        ("vowel_judges:number", {}, "is a int, not a class"),
    ],
)
def test_what_cannot_be_loaded_is_named_in_one_line(
    folder: Path, use: str, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(JudgeError) as caught:
        load_judge(spec(use, **params), [folder])
    assert message in str(caught.value)
    assert use.partition(":")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_package_nobody_has\n", "needs 'a_package_nobody_has', which is not installed"),
        ("def broken(:\n", "cannot be imported: SyntaxError"),
        ("raise RuntimeError('side effect')\n", "cannot be imported: RuntimeError: side effect"),
    ],
)
def test_a_module_that_does_not_import_is_told_from_a_missing_one(folder: Path, source: str, message: str) -> None:
    (folder / "bad_judge_module.py").write_text(source)
    with pytest.raises(JudgeError, match=message):
        load_judge(spec("bad_judge_module:Judge"), [folder])


def test_a_hidden_module_beside_the_yaml_is_an_error(folder: Path) -> None:
    """`string` is Python's own and is imported already: the user's file of that name must not be passed over."""
    (folder / "string.py").write_text(USER_MODULE)
    with pytest.raises(JudgeError, match=r"string\.py is hidden by .*string\.py: rename it"):
        load_judge(spec("string:Vowels", weight=1), [folder])


def test_a_folder_named_judges_beside_the_yaml_hides_nothing(folder: Path) -> None:
    """Fitted judges are kept in one: to Python it is a package too, and an editable installation is looked up last.

    In a process of its own, for here `judges` is imported already; a judge of the user's own is loaded first.
    """
    (folder / "judges").mkdir()
    script = (
        "from pathlib import Path; from online_dpo.judging.importing import import_object; import sys; "
        "folder = [Path(sys.argv[1])]; print(import_object('vowel_judges:Vowels', folder).__name__, "
        "import_object('judges.length:LengthJudge', folder).__name__)"
    )
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=_installed_only())
    assert (done.stdout, done.returncode) == ("Vowels LengthJudge\n", 0), done.stderr


def _installed_only() -> dict[str, str]:
    """This environment without what a run of the tests put on Python's path; "safe": not the working folder either."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "PYTHONSAFEPATH": "1"}


@pytest.mark.parametrize("source", ["class LengthJudge: pass\n", "import a_package_nobody_has\n", "1 / 0\n"])
def test_another_projects_judges_package_is_told_from_ours(
    tmp_path: Path, clean_imports: None, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges" / "__init__.py").write_text(source)
    (tmp_path / "judges" / "length.py").write_text(source)
    for name in [name for name in sys.modules if name.partition(".")[0] == "judges"]:
        monkeypatch.delitem(sys.modules, name)
    sys.path.insert(0, str(tmp_path))
    for load in (load_judge, judge_digest):
        for use in ("judges.length:LengthJudge", "judges:LengthJudge"):
            with pytest.raises(JudgeError, match=r"not online-dpo's; another project on PyPI has the same name"):
                load(spec(use), [])


JURY = """
from typing import ClassVar
from online_dpo.judging import PairwiseJudge, PointwiseJudge

class Jury(PointwiseJudge):
    judge_params: ClassVar = ("judges", "chair")
    def __init__(self, judges, chair=None):
        self.judges = judges
        self.chair = chair
    def score(self, prompt, candidates):
        rows = [judge.scores([(prompt, candidates)])[0] for judge in self.judges]
        return [sum(answer.value for answer in column) for column in zip(*rows)]

class Constant(PointwiseJudge):
    def __init__(self, value):
        self.value = value
    def score(self, prompt, candidates):
        return [self.value] * len(candidates)

class SelfJudge(Constant):
    uses_policy = True

class First(PairwiseJudge):
    def prefer(self, prompt, first, second):
        return 1.0

class Apart(Constant):
    own_process = True

class ApartJury(Jury):
    own_process = True

class Files(PointwiseJudge):
    file_params: ClassVar = ("model", "more")
    def __init__(self, model=None, more=()):
        self.model = model
        self.more = more
    def score(self, prompt, candidates):
        return [0.0] * len(candidates)
"""


@pytest.fixture
def jury(folder: Path) -> Path:
    (folder / "jury_judges.py").write_text(JURY)
    return folder


def constant(value: float) -> dict[str, Any]:
    return {"use": "jury_judges:Constant", "value": value}


def test_inner_judges_come_ready_to_be_asked(jury: Path, tmp_path: Path) -> None:
    with VerdictCache(tmp_path / "v.sqlite") as cache:
        judges = [constant(1.0), constant(2.0), "vowel_judges:DuckPair"]
        asked = open_judge(
            spec("jury_judges:Jury", judges=judges, chair=constant(7.0)), [jury], Asking(cache=cache, limit_s=30.0)
        )
        inner: Any = asked.judge
        assert all(isinstance(one, AskedJudge) for one in [*inner.judges, inner.chair])
        assert asked.inner == (*inner.judges, inner.chair)
        assert [one.name for one in asked.inner] == ["jury_judges:Constant"] * 2 + [
            "vowel_judges:DuckPair",
            "jury_judges:Constant",
        ]
        assert len({one.digest for one in [asked, *asked.inner]}) == 5
        assert asked.scores([item("p", 2)]) == [[Opinion(3.0), Opinion(3.0)]]
        # The jury's row, two constants' rows, and the pair in both orders; the chair was not asked.
        assert len(cache) == 5
    assert isinstance(load_judge(spec("jury_judges:Jury", judges=[constant(1.0)]), [jury]), PointwiseJudge)


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        ([{"value": 1.0}], "judge 'jury_judges:Jury': "),
        ([7], "judge 'jury_judges:Jury': "),
        (["no colon"], "module:Class"),
        (["jury_judges:Nobody"], "has no 'Nobody'"),
        ([{"use": "jury_judges:Constant", "valeu": 1}], "unknown key 'valeu' (did you mean 'value'?)"),
    ],
)
def test_a_wrong_inner_judge_is_named_in_one_line(jury: Path, judges: Any, message: str) -> None:
    for load in (load_judge, judge_digest):
        if load is judge_digest and "valeu" in message:
            continue  # keys are checked as a judge is constructed, and a digest constructs none
        with pytest.raises(JudgeError) as caught:
            load(spec("jury_judges:Jury", judges=judges), [jury])
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_where_a_judge_runs_is_not_the_constructors_business(jury: Path) -> None:
    judge: Any = load_judge(spec("jury_judges:Constant", value=1.0, actor={"gpus": 0}), [jury])
    assert judge.value == 1.0


def test_a_judge_that_wants_a_process_of_its_own_is_placed(jury: Path) -> None:
    placed: list[str] = []

    def place(spec: Any, folders: Any) -> Any:
        placed.append(spec.use)
        return load_judge(spec, folders)

    judges = [constant(1.0), {**constant(2.0), "actor": {}}, {"use": "jury_judges:Apart", "value": 3.0}]
    asked = open_judge(spec("jury_judges:Jury", judges=judges), [jury], None, place)
    assert placed == ["jury_judges:Constant", "jury_judges:Apart"]
    assert asked.scores([item("p", 1)]) == [[Opinion(6.0)]]


@pytest.mark.parametrize(("use", "more"), [("Jury", {"actor": {}}), ("ApartJury", {})])
def test_a_judge_made_of_judges_has_no_process_of_its_own(jury: Path, use: str, more: dict[str, Any]) -> None:
    with pytest.raises(JudgeError, match="is made of judges: give 'actor' to those inside instead"):
        open_judge(spec(f"jury_judges:{use}", judges=[constant(1.0)], **more), [jury])


def test_what_a_judge_is_can_be_told_before_it_is_loaded(jury: Path) -> None:
    plain, own = constant(1.0), {"use": "jury_judges:SelfJudge", "value": 1.0}
    assert compares(spec("jury_judges:First"), [jury])
    assert not compares(spec("jury_judges:Constant", value=1.0), [jury])
    assert [asks_policy(spec("jury_judges:Jury", judges=judges), [jury]) for judges in ([plain], [plain, own])] == [
        False,
        True,
    ]
    assert asks_policy(spec("jury_judges:SelfJudge", value=1.0), [jury])


def test_files_are_looked_for_beside_the_experiment_first(
    jury: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    for where in (jury, elsewhere):
        (where / "both.txt").write_text("x")
    (elsewhere / "here.txt").write_text("x")

    def found(**params: Any) -> Any:
        return load_judge(spec("jury_judges:Files", **params), [jury])

    assert found(model="both.txt").model == str(jury / "both.txt")
    assert found(model="here.txt").model == str(elsewhere / "here.txt")
    assert found(model="org/a-model").model == "org/a-model"
    assert found(model=str(jury / "both.txt")).model == str(jury / "both.txt")
    assert found(more=["both.txt", "org/a-model"]).more == [str(jury / "both.txt"), "org/a-model"]
    for odd in ("", "x" * 5000, "a\0b", "~nobody-of-that-name/x"):
        assert found(model=odd).model == odd
        assert len(judge_digest(spec("jury_judges:Files", model=odd), [jury])) == 64
