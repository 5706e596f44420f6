"""Judges that are not there, cannot be made, or answer with anything but scores."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from case import Case
from classifiers import save_classifier
from llm_double import Double, Step, said
from one_process import one_process
from tiny_models import kept, llama, reward_model

from experiments import write_rows, written

Arrange = Callable[[Path], list[str]]
LENGTH = {"use": "judges.length:LengthJudge", "unit": "characters"}
LLM = {"use": "judges.llm:LLMScoreJudge", "model": "m", "patience_s": 0.01, "retries": 0}
SCORE = "class Mine:\n    def score(self, prompt, candidates):\n        "
THREE = {"n": 3, "max_tokens": 8}
SOME = SCORE + "return [None if i == 0 and len(candidates) > 1 else float(i) for i in range(len(candidates))]\n"
METHOD = "    def score(self, p, c):\n        return [0] * len(c)\n"
POINTWISE = "from online_dpo.judging import PointwiseJudge\nclass Mine(PointwiseJudge):\n"
PREFER = "class Mine:\n    def prefer(self, prompt, first, second):\n        "


def judge(use: str, **keys: Any) -> Arrange:
    """`check` with this judge."""
    return lambda folder: written(folder, judge={"use": use, **keys})


def own(source: str, use: str = "mine:Mine", **keys: Any) -> Arrange:
    """`check` with a judge of the user's own, in mine.py."""

    def arrange(folder: Path) -> list[str]:
        (folder / "mine.py").write_text(source, encoding="utf-8")
        return written(folder, judge={"use": use, **keys})

    return arrange


def begun(name: str, source: str, says: str, *, goes_on: bool = False, **settings: Any) -> Case:
    """A run with a judge of the user's own, whose fault shows only when it is asked."""

    def arrange(folder: Path) -> list[str]:
        (folder / "mine.py").write_text(source, encoding="utf-8")
        return [*written(folder, "run", judge={"use": "mine:Mine"}, **settings), "--quiet"]

    return Case(f"judging: {name}", arrange, says, goes_on=goes_on, begun=True, around=one_process)


def asks(name: str, answers: Callable[[], str], says: str, **keys: Any) -> Case:
    """A run whose judge asks a server."""

    def arrange(folder: Path) -> list[str]:
        return [*written(folder, "run", judge={**LLM, "base_url": answers(), **keys}), "--quiet"]

    return Case(f"server: {name}", arrange, says, begun=True, around=one_process)


def scored(expression: str) -> str:
    return f"{SCORE}return {expression}\n"


def settings(**changes: Any) -> Arrange:
    return lambda folder: written(folder, **changes)


def hidden(folder: Path) -> list[str]:
    """A file beside the experiment that has the name of a module of Python's own."""
    (folder / "colorsys.py").write_text(scored("[0]"), encoding="utf-8")
    return written(folder, judge="colorsys:Mine")


def misspelt_module(folder: Path) -> list[str]:
    (folder / "my_judge.py").write_text(scored("[0]"), encoding="utf-8")
    return written(folder, judge="my_jugde:Mine")


def inner(use: str, **keys: Any) -> Arrange:
    """A judge around another one whose key is misspelt."""
    return judge(use, judge={**LENGTH, "unti": "words"}, **keys)


def classifier(change: Callable[[Path], object] = lambda _: None, **config: Any) -> Arrange:
    """A reward model of this configuration, changed."""

    def arrange(folder: Path) -> list[str]:
        save_classifier(folder / "reward", **config)
        change(folder / "reward")
        return written(folder, judge={"use": "judges.reward_model:RewardModelJudge", "model": "reward"})

    return arrange


def language_model_as_reward(folder: Path) -> list[str]:
    return written(folder, judge={"use": "judges.reward_model:RewardModelJudge", "model": str(kept(llama))})


def reward(**keys: Any) -> Arrange:
    return judge("judges.reward_model:RewardModelJudge", model=str(kept(reward_model)), **keys)


def template(text: str) -> Arrange:
    def arrange(folder: Path) -> list[str]:
        (folder / "ask.txt").write_text(text, encoding="utf-8")
        return written(folder, judge={**LLM, "base_url": "http://127.0.0.1:9/v1", "template": "ask.txt"})

    return arrange


def people(name: str, content: str) -> Arrange:
    def arrange(folder: Path) -> list[str]:
        (folder / name).write_text(content, encoding="utf-8")
        return written(folder, judge={"use": "judges.human:HumanJudge", "answers": "answers.jsonl"})

    return arrange


def key_in_plain_text(folder: Path) -> list[str]:
    return written(folder, judge={**LLM, "api_key": "sk-proj-0123456789abcdefghijABCDEFGHIJ0123456789"})


def audited(source: str, *options: str) -> Arrange:
    """`judge audit` of a judge of the user's own."""

    def arrange(folder: Path) -> list[str]:
        (folder / "mine.py").write_text(source, encoding="utf-8")
        pairs = [{"prompt": f"Question {i}?", "chosen": "Yes.", "rejected": "No, never."} for i in range(4)]
        write_rows(folder / "pairs.jsonl", pairs)
        return ["judge", "audit", "--judge", "mine:Mine", "--pairs", "pairs.jsonl", "--quiet", *options]

    return arrange


def nobody() -> str:
    """An address where nothing listens."""
    return "http://127.0.0.1:9/v1"


def answering(step: Callable[[], Step]) -> Callable[[], str]:
    return functools.cache(lambda: _server_of(step()))


def _server_of(step: Step) -> str:
    double = Double(lambda *_: step, models=("other-model",)).__enter__()
    atexit.register(double.__exit__, None, None, None)
    return double.url


CASES: tuple[Case, ...] = (
    Case("judge: the key is missing", settings(judge=None), r"judge"),
    Case("judge: no class is named", judge("judges.length"), r'a judge is named as "module:Class"'),
    Case("judge: a path of a file", judge("./mine.py:Mine"), r'a judge is named as "module:Class"'),
    Case("judge: a module that is not there", misspelt_module, r"no module 'my_jugde' \(did you mean 'my_judge'\?\)"),
    Case(
        "judge: a misspelt module of ours",
        judge("judges.reward_modle:RewardModelJudge"),
        r"did you mean 'judges\.reward_model'\?",
    ),
    Case(
        "judge: a misspelt class",
        judge("judges.length:LenghtJudge"),
        r"has no 'LenghtJudge' \(did you mean 'LengthJudge'\?\)",
    ),
    Case(
        "judge: a misspelt class of one's own",
        own(scored("[0]"), "mine:Mien"),
        r"has no 'Mien' \(did you mean 'Mine'\?\)",
    ),
    Case(
        "judge: a misspelt key",
        judge("judges.length:LengthJudge", unti="words"),
        r"unknown key 'unti' \(did you mean 'unit'\?\)",
    ),
    Case("judge: a key that has no like", judge("judges.length:LengthJudge", zzz=1), r"unknown key 'zzz'; known: "),
    Case(
        "judge: a misspelt value",
        judge("judges.length:LengthJudge", unit="wrods"),
        r"no unit 'wrods' \(did you mean 'words'\?\)",
    ),
    Case("judge: a missing key", judge("judges.function:FunctionJudge"), r"key 'function' is missing"),
    Case("judge: a module that Python has too", hidden, r"colorsys\.py is hidden by"),
    Case(
        "judge: a syntax error in its file",
        own("class Mine:\n    def score(self, prompt, candidates)\n"),
        r"module 'mine' cannot be imported: SyntaxError",
    ),
    Case("judge: a NUL in its file", own("x = 1\0\n"), r"module 'mine' cannot be imported"),
    Case(
        "judge: its file raises",
        own("raise RuntimeError('no weights\\nhere')\n"),
        r"module 'mine' cannot be imported: RuntimeError: no weights here",
    ),
    Case(
        "judge: its file ends the program",
        own("import sys\nsys.exit(0)\n"),
        r"module 'mine' cannot be imported: SystemExit",
    ),
    Case(
        "judge: its file imports itself without end",
        own("def f():\n    f()\nf()\n"),
        r"module 'mine' cannot be imported: RecursionError",
    ),
    Case(
        "judge: its file needs a package that is not installed",
        own("import no_such_package\n"),
        r"module 'mine' needs 'no_such_package', which is not installed",
    ),
    Case(
        "judge: its file imports a name that is not there",
        own("from json import laods\n"),
        r"module 'mine' cannot be imported: ImportError",
    ),
    Case("judge: its file is empty", own(""), r"module 'mine' has no 'Mine'"),
    Case(
        "judge: a function",
        own("def mine(prompt, answer):\n    return 0\n", "mine:mine"),
        r"is a function, not a class; write use: judges\.function:FunctionJudge",
    ),
    Case("judge: a number", own("Mine = 7\n"), r"is a int, not a class|is an int, not a class"),
    Case(
        "judge: a class that judges nothing",
        own("class Mine:\n    pass\n"),
        r"neither 'score' \(PointwiseJudge\) nor 'prefer'",
    ),
    Case(
        "judge: a class that scores and prefers",
        own(scored("[0]") + "    def prefer(self, prompt, a, b):\n        return 1\n"),
        r"has both 'score' and 'prefer'",
    ),
    Case(
        "judge: a subclass that defines nothing",
        own("from online_dpo.judging import PointwiseJudge\nclass Mine(PointwiseJudge):\n    pass\n"),
        r"does not define 'score'",
    ),
    Case(
        "judge: score with too few parameters",
        own("class Mine:\n    def score(self, candidates):\n        return [0]\n"),
        r"score",
    ),
    Case(
        "judge: a promise of scores",
        own("class Mine:\n    async def score(self, prompt, candidates):\n        return [0]\n"),
        r"'score' must not be async",
    ),
    Case(
        "judge: its constructor raises",
        own("class Mine:\n    def __init__(self):\n        raise OSError('no file')\n" + METHOD),
        r"cannot be constructed: OSError: no file",
    ),
    Case(
        "judge: its constructor ends the program",
        own("class Mine:\n    def __init__(self):\n        raise SystemExit\n" + METHOD),
        r"cannot be constructed: SystemExit",
    ),
    Case(
        "judge: its constructor wants what was not given",
        own(
            "class Mine:\n    def __init__(self, file):\n        pass\n    def score(self, p, c):\n        return [0]\n"
        ),
        r"key 'file' is missing",
    ),
    Case(
        "judge: keys where it takes none", own(scored("[0]"), threshold=3), r"unknown key 'threshold'; it takes no keys"
    ),
    Case(
        "judge: an actor of no GPUs at all",
        judge("judges.length:LengthJudge", unit="words", actor={"gpus": -1}),
        r"actor\.gpus: .*greater than or equal to 0",
    ),
    Case(
        "judge: a misspelt key of its actor",
        judge("judges.length:LengthJudge", unit="words", actor={"gpu": 1}),
        r"unknown key 'judge\.actor\.gpu' \(did you mean 'gpus'\?\)",
    ),
    Case(
        "judge: a function that is not there",
        judge("judges.function:FunctionJudge", function="math:squrt"),
        r"function 'math:squrt': module 'math' has no 'squrt'",
    ),
    Case(
        "judge: a function that is none",
        judge("judges.function:FunctionJudge", function="math:pi"),
        r"'math:pi' is a float, not a function",
    ),
    Case("judge: a pattern that is none", judge("judges.pattern:PatternJudge", require=["(a"]), r"PatternJudge"),
    Case("judge: no patterns", judge("judges.pattern:PatternJudge"), r"give at least one pattern"),
    Case("judge: no words", judge("judges.keyword:KeywordJudge"), r"give at least one word"),
    Case(
        "judge: checks that nobody knows",
        judge("judges.format:FormatJudge", checks=["finnished"]),
        r"no check 'finnished' \(did you mean 'finished'\?\)",
    ),
    Case(
        "judge: one that asks the policy as the measure",
        judge("judges.self_judge:SelfJudge"),
        r"asks the policy that it judges|no '",
    ),
    Case(
        "judge: noise of less than nothing",
        judge("judges.noisy:NoisyJudge", judge=LENGTH, rate=-0.1),
        r"rate must be a number from 0 to 1, found -0\.1",
    ),
    Case(
        "judge: noise of more than all",
        judge("judges.noisy:NoisyJudge", judge=LENGTH, rate=1.5),
        r"rate must be a number from 0 to 1, found 1\.5",
    ),
    Case(
        "judge: noise that is a text",
        judge("judges.noisy:NoisyJudge", judge=LENGTH, rate="some"),
        r"rate must be a number from 0 to 1, found 'some'",
    ),
    Case("judge: noise NaN", judge("judges.noisy:NoisyJudge", judge=LENGTH, rate=float("nan")), r"rate"),
    Case("judge: noise around nothing", judge("judges.noisy:NoisyJudge", rate=0.1), r"key 'judge' is missing"),
    Case(
        "judge: noise around a judge whose key is misspelt",
        inner("judges.noisy:NoisyJudge", rate=0.1),
        r"unknown key 'unti' \(did you mean 'unit'\?\)",
    ),
    Case(
        "judge: noise around a number",
        judge("judges.noisy:NoisyJudge", rate=0.1, judge=7),
        r"judge 'judges\.noisy:NoisyJudge'",
    ),
    Case(
        "judge: a panel of nobody",
        judge("judges.panel:PanelJudge", judges=[]),
        r"judges must be a list of two judges or more",
    ),
    Case(
        "judge: a panel of one",
        judge("judges.panel:PanelJudge", judges=[LENGTH]),
        r"judges must be a list of two judges or more",
    ),
    Case(
        "judge: a panel that combines in no known way",
        judge("judges.panel:PanelJudge", judges=[LENGTH, LENGTH], combine="meen"),
        r"no combine 'meen' \(did you mean 'mean'\?\)",
    ),
    Case(
        "judge: a panel with a weight too few",
        judge("judges.panel:PanelJudge", judges=[LENGTH, LENGTH], weights=[1]),
        r"weights must be 2 numbers above 0",
    ),
    Case(
        "judge: a panel with a member that is not there",
        judge("judges.panel:PanelJudge", judges=[LENGTH, "judges.lenght:LengthJudge"]),
        r"did you mean 'judges\.length'\?",
    ),
    Case(
        "judge: answers of people that are not there",
        judge("judges.human:HumanJudge", answers="anwers.jsonl"),
        r"HumanJudge",
    ),
    Case("judge: answers of people in no form", people("answers.jsonl", "{}\n"), r"HumanJudge: .*answers\.jsonl"),
    Case(
        "judge: a fitted model that is not there",
        judge("judges.bradley_terry:BradleyTerryJudge", model="nowhere"),
        r"nowhere",
    ),
    Case(
        "judge: a verifier of no known kind",
        judge("judges.verifier:VerifierJudge", kind="nummber"),
        r"did you mean|no kind",
    ),
    Case("judge: a negative time limit", settings(judge_timeout=-1), r"judge_timeout: .*greater than 0"),
    Case(
        "judge: a budget of nothing",
        settings(judge_budget={"calls": 0}),
        r"judge_budget\.calls: .*greater than or equal to 1",
    ),
    Case(
        "judge: a share of abstentions above all", settings(max_abstain=1.5), r"max_abstain: .*less than or equal to 1"
    ),
    Case(
        "judge: the gold judge is not there",
        settings(select="best_gold"),
        r"select: best_gold needs a judge at evaluation\.gold",
    ),
    Case(
        "judge: the gold judge is misspelt",
        settings(evaluation={"gold": {"use": "judges.length:LenghtJudge"}}),
        r"did you mean 'LengthJudge'\?",
    ),
    Case(
        "judge: the second judge of the audit is misspelt",
        settings(audit={"against": "judges.lenght:LengthJudge"}),
        r"did you mean 'judges\.length'\?",
    ),
    Case(
        "judge: a reward model that is not there",
        judge("judges.reward_model:RewardModelJudge", model="nowhere/at-all"),
        r"RewardModelJudge: 'nowhere/at-all' is no folder here, and the hub does not give it",
    ),
    Case("judge: a language model as reward model", language_model_as_reward, r"has 2 outputs; a reward model has 1"),
    Case("judge: a reward model of three outputs", classifier(num_labels=3), r"has 3 outputs; a reward model has 1"),
    Case(
        "judge: a reward model without a configuration",
        classifier(lambda m: (m / "config.json").unlink()),
        r"RewardModelJudge: cannot load",
    ),
    Case("judge: a reward model whose deviation is 0", reward(score_std=0), r"score_std must be above 0"),
    Case(
        "judge: a reward model that reads nothing",
        reward(max_length=0),
        r"max_length must be a whole number from 1, found 0",
    ),
    Case(
        "judge: a reward model in batches of a half",
        reward(batch_size=0.5),
        r"batch_size must be a whole number from 1, found 0\.5",
    ),
    Case("judge: a language model of no name", judge("judges.llm:LLMJudge"), r"key 'model' is missing"),
    Case(
        "judge: a language model without a key",
        judge("judges.llm:LLMJudge", model="m"),
        r"the environment variable OPENAI_API_KEY \(api_key_env\) holds no key",
    ),
    Case(
        "judge: a language model whose key is in no variable",
        judge("judges.llm:LLMJudge", model="m", api_key_env="NO_SUCH_KEY_HERE"),
        r"the environment variable NO_SUCH_KEY_HERE \(api_key_env\) holds no key",
    ),
    Case(
        "judge: a language model's key in plain text",
        key_in_plain_text,
        r"judge\.api_key looks like a key in plain text",
    ),
    Case(
        "judge: a language model at no address",
        judge("judges.llm:LLMJudge", model="m", base_url="localhost:8000"),
        r"base_url must look like http://host:port/v1, found 'localhost:8000'",
    ),
    Case(
        "judge: a language model's password in its address",
        judge("judges.llm:LLMJudge", model="m", base_url="http://me:secret@host/v1"),
        r"judge\.base_url looks like a key in plain text",
    ),
    Case(
        "judge: a language model's key misspelt",
        judge("judges.llm:LLMJudge", modle="m"),
        r"unknown key 'modle' \(did you mean 'model'\?\)",
    ),
    Case(
        "judge: grades from high to low",
        judge("judges.llm:LLMScoreJudge", model="m", base_url=nobody(), low=5, high=1),
        r"low and high must be whole numbers",
    ),
    Case(
        "judge: orders that disagree in no known way",
        judge("judges.llm:LLMJudge", model="m", base_url=nobody(), disagreement="avrage"),
        r"disagreement must be one of average, tie, abstain \(did you mean 'average'\?\)",
    ),
    Case("judge: a template without a place for the answer", template("Grade this: {prompt}"), r"ask\.txt"),
    Case(
        "judge: a template that is not there",
        judge("judges.llm:LLMScoreJudge", model="m", base_url=nobody(), template="aks.txt"),
        r"aks\.txt",
    ),
    begun(
        "raises",
        SCORE + "raise ValueError('cannot')\n",
        r"judge 'mine:Mine' abstained on .* more than max_abstain 0\.2 allows: ValueError: cannot",
    ),
    begun(
        "hangs",
        "import time\n" + SCORE + "time.sleep(5)\n",
        r"judge 'mine:Mine' at prompt '.*' has not answered for 0\.2 s",
        judge_timeout=0.2,
    ),
    begun("NaN", scored("[float('nan')] * len(candidates)"), r"abstained on .*returned nan"),
    begun("infinity", scored("[float('inf')] * len(candidates)"), r"abstained on .*returned inf"),
    begun("numbers as text", scored("['0.5'] * len(candidates)"), r"abstained on .*returned str, not a number"),
    begun("None for each", scored("[None] * len(candidates)"), r"abstained on .*judge declined"),
    begun("None", scored("None"), r"returned NoneType instead of \d scores"),
    begun("one number", scored("0.5"), r"returned float instead of \d scores"),
    begun("a text", scored("'good'"), r"returned str instead of \d scores"),
    begun("a mapping", scored("{c.text: 1 for c in candidates}"), r"returned dict instead of \d scores"),
    begun("no scores", scored("[]"), r"returned 0 scores instead of \d"),
    begun("a score too many", scored("[0] * (len(candidates) + 1)"), r"returned 2 scores instead of 1"),
    begun(
        "scores without end",
        "import itertools\n" + scored("itertools.count()"),
        r"returned more than 1 scores instead of 1",
    ),
    begun("lists of scores", scored("[[1.0] for c in candidates]"), r"abstained on .*returned list, not a number"),
    begun("complex numbers", scored("[1j] * len(candidates)"), r"abstained on .*returned complex, not a number"),
    begun("numbers too large", scored("[10 ** 400] * len(candidates)"), r"abstained on .*returned a number too large"),
    begun(
        "objects that raise when they are read",
        "class Bad:\n    ndim = 0\n    def item(self):\n        raise OSError('gone')\n"
        + scored("[Bad()] * len(candidates)"),
        r"returned Bad, which cannot be read: OSError: gone",
    ),
    begun(
        "changes the candidates",
        SCORE + "candidates[0].text = 'better'\n        return [0] * len(candidates)\n",
        r"abstained on .*FrozenInstanceError",
    ),
    begun("preferences beyond 1", PREFER + "return 7\n", r"abstained on .*returned a number outside \[0, 1\]"),
    begun("names instead of preferences", PREFER + "return 'A'\n", r"abstained on .*returned str, not a number"),
    begun(
        "batches of nothing",
        POINTWISE + "    batch_prompts = 0\n" + METHOD,
        r"batch_prompts must be a whole number from 1, found 0",
    ),
    begun(
        "scores as a generator", scored("(float(len(c.text)) for c in candidates)"), r"on_policy, round 1", goes_on=True
    ),
    begun(
        "scores of numpy",
        "import numpy\n" + scored("numpy.arange(len(candidates))"),
        r"on_policy, round 1",
        goes_on=True,
    ),
    begun(
        "a liking for the first place",
        PREFER + "return 0.6 if len(first.text) > len(second.text) else 0.5\n",
        r"on_policy, round 1",
        goes_on=True,
    ),
    begun(
        "another mind every time",
        "import random\n" + PREFER + "return random.random()\n",
        r"on_policy, round 1",
        goes_on=True,
    ),
    begun("one abstention in three", SOME, r"abstained on .* more than max_abstain 0\.2 allows", sampling=THREE),
    begun(
        "one abstention in three where half may be",
        SOME,
        r"on_policy, round 1",
        goes_on=True,
        sampling=THREE,
        max_abstain=0.5,
    ),
    asks(
        "away",
        nobody,
        r"the model server http://127\.0\.0\.1:9/v1: .*patience_s 0\.01.*run again when the server answers",
    ),
    asks(
        "another model's",
        answering(lambda: Step({"error": {"message": "no"}}, status=404)),
        r"no model 'm'; it has: other-model",
    ),
    asks(
        "wants a key", answering(lambda: Step({"error": {"message": "no"}}, status=401)), r"status 401: it wants a key"
    ),
    asks(
        "answers of no form",
        answering(lambda: Step("<html>hello</html>")),
        r"abstained on .*the reply has no valid form",
    ),
    asks(
        "answers that are no grade",
        answering(lambda: Step(said("It depends."))),
        r"abstained on .*no valid verdict|abstained on",
    ),
    asks(
        "fails", answering(lambda: Step({"error": {"message": "out of memory"}}, status=500)), r"status 500.*patience_s"
    ),
    Case(
        "audit: a judge that returns too few",
        audited(scored("[0]")),
        r"judge 'mine:Mine' at prompt '\d': returned 1 scores instead of 2",
    ),
    Case(
        "audit: a judge that hangs",
        audited("import time\n" + SCORE + "time.sleep(5)\n", "--timeout", "0.2"),
        r"has not answered for 0\.2 s",
    ),
    Case(
        "audit: a judge that raises is counted",
        audited(SCORE + "raise ValueError('cannot')\n"),
        r"abstain",
        goes_on=True,
    ),
    Case(
        "audit: a misspelt judge",
        lambda f: [*audited(scored("[0]"))(f), "--judge", "mine:Mien"],
        r"did you mean 'Mine'\?",
    ),
)
