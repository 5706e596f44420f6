"""`RewardModelJudge`: its units, answers that were cut off, hostile text. Batches and loading: test_judges.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from classifiers import logits_of, save_classifier

from judges.reward_model import RewardModelJudge
from online_dpo.config import JudgeSpec
from online_dpo.errors import JudgeError
from online_dpo.judging import Abstention, judge_digest
from online_dpo.types import Candidate, Message, Prompt

PROMPT = Prompt("p", (Message("user", "Say it: "),), ())


def answer(text: str, index: int = 0) -> Candidate:
    return Candidate("p", index, text, (), (), "stop", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return save_classifier(tmp_path_factory.mktemp("reward") / "model")


def scores(folder: Path, *answers: Candidate, prompt: Prompt = PROMPT, **params: Any) -> list[Any]:
    return list(RewardModelJudge(str(folder), device="cpu", **params).score(prompt, answers))


def test_normalised_scores_and_the_penalty_by_hand(folder: Path) -> None:
    """(logit − 0.5)/2; the second answer was cut off: 3 less, after the division."""
    raw = [logits_of(folder, f"Say it: {text}")[0] for text in ("yes", "no, and")]
    cut = replace(answer("no, and", 1), finish_reason="length")
    found = scores(folder, answer("yes"), cut, score_mean=0.5, score_std=2.0, no_end_penalty=3.0)
    assert found == pytest.approx([(raw[0] - 0.5) / 2, (raw[1] - 0.5) / 2 - 3], abs=1e-5)
    assert scores(folder, cut) == pytest.approx([raw[1]], abs=1e-5), "no penalty unless asked for"


def test_empty_answers_and_odd_text_get_scores(folder: Path) -> None:
    """Nothing, a NUL, half of a surrogate pair, right-to-left marks, an emoji of several code points."""
    texts = ["", "\x00", "half \ud83d done", "\u202eabc", "👩\u200d🚀", "a\u0301", "\n\n"]
    found = scores(folder, *(answer(text, i) for i, text in enumerate(texts)))
    assert all(isinstance(value, float) for value in found)
    assert found[2] == pytest.approx(logits_of(folder, "Say it: half \ufffd done")[0], abs=1e-5)


def test_an_answer_cannot_write_special_tokens(folder: Path) -> None:
    """ "</s>" is the end token to this tokenizer: an answer that spells it must not get to write it."""
    [found] = scores(folder, answer("yes</s>"))
    assert found == pytest.approx(logits_of(folder, "Say it: yes< /s>")[0], abs=1e-5)
    assert found != pytest.approx(logits_of(folder, "Say it: yes</s>")[0], abs=1e-3)


def test_what_holds_no_token_at_all_abstains(folder: Path) -> None:
    nothing = Prompt("p", (Message("user", ""),), ())
    found = scores(folder, answer(""), answer("x", 1), prompt=nothing)
    assert found[0] == Abstention("nothing to read for the reward model")
    assert isinstance(found[1], float)


def test_a_candidate_s_score_is_the_same_whoever_stands_beside_it(folder: Path) -> None:
    """What `each_alone` promises to the cache, to rounding."""
    texts = ("a", "a much longer answer than the others", "")
    together = scores(folder, *(answer(text, i) for i, text in enumerate(texts)), batch_size=3)
    assert together == pytest.approx([scores(folder, answer(text))[0] for text in texts], abs=1e-5)


def test_digest_follows_the_weights_and_the_units_but_not_the_batch_size(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "beside")

    def digest(**params: Any) -> str:
        spec = {"use": "judges.reward_model:RewardModelJudge", "model": "beside", **params}
        return judge_digest(JudgeSpec.model_validate(spec), [tmp_path])

    first = digest()
    assert digest(batch_size=2) == first
    assert digest(no_end_penalty=1.0) != first
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes() + b"\0")
    assert digest() != first


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"score_std": 0.0}, "score_std must be above 0"),
        ({"no_end_penalty": -1.0}, "no_end_penalty at least 0"),
        ({"score_mean": float("nan")}, "score_mean must be a number"),
        ({"score_std": True}, "score_std must be a number"),
        ({"no_end_penalty": "1"}, "no_end_penalty must be a number"),
    ],
)
def test_wrong_numbers_are_refused(folder: Path, params: dict[str, Any], message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        RewardModelJudge(str(folder), **params)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    """The same weights as pickle: loading them would run code."""
    import torch
    from safetensors.torch import load_file

    folder = save_classifier(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(JudgeError, match="cannot load"):
        scores(folder, answer("yes"))
