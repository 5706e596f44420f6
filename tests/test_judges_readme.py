"""judges/README.md: every snippet is run as it stands there."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from online_dpo.config import ComparingSpec, JudgeSpec, validate_experiment
from online_dpo.judging import Asking, VerdictCache, judge_all, open_judge
from online_dpo.types import Abstain, Candidate, Message, Prompt, Verdict

README = (Path(__file__).resolve().parents[1] / "judges" / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README, re.DOTALL)
YAML = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]
PROMPTS = {"p": Prompt("p", (Message("user", "How was the film?"),), (1,))}
TEXTS = (
    "It was lovely, thank you for asking!",
    "Bad.",
    "Long, slow, grey, and then it ended; I was sorry, and glad, and went home in the rain.",
    "",
)
CANDIDATES = [Candidate("p", i, text, (1,) * (i + 1), (-1.0,) * (i + 1), "stop", i) for i, text in enumerate(TEXTS)]


class Scoring(BaseHTTPRequestHandler):
    """Scores an answer by its length."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"score": len(asked["answer"])}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scoring)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/score"
    server.shutdown()


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A folder with the page's files in it, and a small classifier under the name that the page uses."""
    import torch
    from conftest import byte_tokenizer
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("tutorial")
    for name, source in PYTHON:
        (folder / name).write_text(source, encoding="utf-8")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForSequenceClassification(config).save_pretrained(folder / "my-classifier")
    tokenizer.save_pretrained(folder / "my-classifier")
    return folder


def specs() -> list[tuple[str, JudgeSpec, ComparingSpec]]:
    made = []
    for block in YAML:
        spec = JudgeSpec.model_validate(block["judge"])
        made.append((spec.use, spec, ComparingSpec.model_validate(block.get("comparing", {}))))
    return made


def test_the_page_has_its_snippets() -> None:
    assert {name for name, _ in PYTHON} == {
        "brevity.py", "exclaiming.py", "polite.py", "fewer_commas.py", "gentle.py", "remote.py", "classifier.py",
    }  # fmt: skip
    assert README.count("```python") == len(PYTHON)
    assert len(YAML) == len(PYTHON)


@pytest.mark.parametrize("block", YAML, ids=lambda block: str(JudgeSpec.model_validate(block["judge"]).use))
def test_every_yaml_snippet_is_part_of_an_experiment(block: dict[str, Any]) -> None:
    validate_experiment({"name": "x", "model": "m", "prompts": {"path": "p.jsonl"}, **block}, "README")


@pytest.mark.parametrize(("use", "spec", "comparing"), specs(), ids=[use for use, _, _ in specs()])
def test_every_judge_judges(
    use: str, spec: JudgeSpec, comparing: ComparingSpec, beside: Path, url: str, tmp_path: Path
) -> None:
    if "url" in spec.params:
        spec = spec.model_copy(update={"url": url})
    asked = open_judge(spec, [beside], Asking(cache=VerdictCache(tmp_path / "c.sqlite"), comparing=comparing))
    results = judge_all(asked, PROMPTS, CANDIDATES, max_abstain=0.25)
    EXPECTED[use](results)


def scores(results: list[Verdict | Abstain]) -> list[float | None]:
    return [result.score if isinstance(result, Verdict) else None for result in results]


def _brevity(results: list[Verdict | Abstain]) -> None:
    assert scores(results) == [-5, -11, -6, -12]  # 7, 1, 18 and 0 words, wanted 12


def _exclaiming(results: list[Verdict | Abstain]) -> None:
    assert scores(results) == [pytest.approx(1 / len(TEXTS[0])), 0, 0, 0]


def _polite(results: list[Verdict | Abstain]) -> None:
    assert scores(results) == [1, 0, 2, None]
    assert isinstance(results[2], Verdict)
    assert results[2].details == {"found": "sorry, glad"}
    assert results[3] == Abstain("p", 3, "empty answer")


def _fewer_commas(results: list[Verdict | Abstain]) -> None:
    """1, 0, 5 and 0 commas: the two without any are best and equal."""
    found = [score for score in scores(results) if score is not None]
    assert found[1] == pytest.approx(found[3])
    assert found[1] > found[0] > found[2]
    assert sum(found) == pytest.approx(0, abs=1e-9)


def _gentle(results: list[Verdict | Abstain]) -> None:
    found = [score for score in scores(results) if score is not None]
    assert max(found) == 0.5
    assert min(found) < 0


def _remote(results: list[Verdict | Abstain]) -> None:
    assert scores(results) == [len(text) for text in TEXTS]


def _classifier(results: list[Verdict | Abstain]) -> None:
    found = [score for score in scores(results) if score is not None]
    assert len(set(found)) == 4
    assert all(score < 0 for score in found)


EXPECTED: dict[str, Callable[[list[Verdict | Abstain]], None]] = {
    "brevity:Brevity": _brevity,
    "judges.function:FunctionJudge": _exclaiming,
    "polite:Polite": _polite,
    "fewer_commas:FewerCommas": _fewer_commas,
    "gentle:Gentle": _gentle,
    "remote:Remote": _remote,
    "classifier:Classifier": _classifier,
}
