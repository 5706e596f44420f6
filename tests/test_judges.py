"""The built-in judges on small answers whose scores are known by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from judges.length import LengthJudge
from judges.pattern import PatternJudge
from judges.sentiment import SentimentJudge
from online_dpo.config import JudgeSpec
from online_dpo.errors import JudgeError
from online_dpo.judging import PointwiseJudge, judge_all, load_judge
from online_dpo.types import Abstain, Candidate, Message, Prompt, Verdict

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT.parent / "shared" / "data" / "models" / "stories260k"
PROMPT = Prompt("p", (Message("user", "Tell me a story."),), (1, 5, 6))


def answers(*texts: str) -> list[Candidate]:
    """Candidates with one token per character."""
    return [
        Candidate("p", i, text, tuple(map(ord, text)), (-1.0,) * len(text), "stop", i) for i, text in enumerate(texts)
    ]


def spec(use: str, **params: Any) -> JudgeSpec:
    return JudgeSpec.model_validate({"use": use, **params})


def test_importing_the_judges_loads_nothing_heavy() -> None:
    code = (
        "import sys, judges.reward_model, judges.function, judges.length, judges.pattern, judges.sentiment;"
        "print([m for m in ('torch', 'transformers', 'vllm', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- length --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [8.0, 2.0]),
        ({"unit": "characters"}, [8.0, 2.0]),
        ({"unit": "words"}, [3.0, 1.0]),
        ({"unit": "words", "target": 2}, [-1.0, -1.0]),
        ({"unit": "characters", "target": 3}, [-5.0, -1.0]),
        ({"target": 0}, [-8.0, -2.0]),
    ],
)
def test_length(params: dict[str, Any], expected: list[float]) -> None:
    """ "ab  cd e" has 8 characters and 3 words, "xy" 2 and 1; with a target the score is -|length - target|."""
    judge = LengthJudge(**params)
    assert judge.score(PROMPT, answers("ab  cd e", "xy")) == expected


@pytest.mark.parametrize(
    ("params", "message"),
    [({"unit": "word"}, "did you mean 'words'"), ({"target": -1}, "target"), ({"target": 1.5}, "target")],
)
def test_length_refuses(params: dict[str, Any], message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        load_judge(spec("judges.length:LengthJudge", **params), [])


# --- sentiment -----------------------------------------------------------------------------------------------


def test_sentiment_follows_vader() -> None:
    """VADER lists "good" at 1.9; compound = s / sqrt(s² + 15) = 1.9 / sqrt(3.61 + 15) = 0.4404 (rounded to 4)."""
    good, neutral, bad = SentimentJudge().score(PROMPT, answers("good", "the table", "terrible"))
    assert good == 0.4404
    assert neutral == 0.0
    assert -1.0 <= bad < 0.0
    assert SentimentJudge(positive=False).score(PROMPT, answers("good")) == [-0.4404]


# --- pattern -------------------------------------------------------------------------------------------------


def test_pattern_is_the_share_of_conditions_that_hold() -> None:
    """Three conditions: "Yes, 42" has a digit, begins with yes, lacks "sorry": 3/3; "sorry 7": 1/3; "no": 1/3."""
    judge = PatternJudge(require=[r"\d", r"(?i)^yes"], forbid=["sorry"])
    assert judge.score(PROMPT, answers("Yes, 42", "sorry 7", "no")) == pytest.approx([1.0, 1 / 3, 1 / 3])
    assert PatternJudge(forbid=["a"]).score(PROMPT, answers("b", "a")) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "at least one pattern"),
        ({"require": ["("]}, r"require: '\(' is not a regular expression"),
        ({"forbid": "abc"}, "forbid must be a list"),
        ({"require": [3]}, "require must be a list"),
    ],
)
def test_pattern_refuses(params: dict[str, Any], message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        load_judge(spec("judges.pattern:PatternJudge", **params), [])


# --- function ------------------------------------------------------------------------------------------------


def test_function_scores_declines_and_fails_one_answer_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scoring_for_a_test.py").write_text(
        "def share(prompt_text, answer):\n"
        "    assert prompt_text == 'Tell me a story.'\n"
        "    if answer == 'skip':\n"
        "        return None\n"
        "    return answer.count('a') / len(answer)\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    judge = load_judge(spec("judges.function:FunctionJudge", function="scoring_for_a_test:share"), [tmp_path])
    assert judge_all(judge, {"p": PROMPT}, answers("ab", "skip", ""), max_abstain=1) == [
        Verdict("p", 0, 0.5),
        Abstain("p", 1, "judge declined"),
        Abstain("p", 2, "ZeroDivisionError: division by zero"),
    ]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_module_here:f", "no module 'no_such_module_here'"),
        ("math:sqrd", "has no 'sqrd' .did you mean 'sqrt'"),
        ("math:pi", "is a float, not a function"),
        ("math", 'write it as "module:name"'),
    ],
)
def test_function_refuses(function: str, message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        load_judge(spec("judges.function:FunctionJudge", function=function), [])


# --- reward model --------------------------------------------------------------------------------------------

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
TEXTS = ("Once upon a time", "", "A dog ran. " * 4, "Hi", "Lily saw a big red ball in the park.", "Lily saw a")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    if not STORIES.is_dir():
        pytest.skip(f"needs the stories260k tokenizer at ../shared/data, absent at {STORIES.name}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(STORIES)


def build(tokenizer: Any, folder: Path, **changes: Any) -> Path:
    """A random two-layer Llama classifier with the stories260k vocabulary, saved with a tokenizer to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    causal = changes.pop("causal", False)
    pad, template = changes.pop("pad", None), changes.pop("template", None)
    settings: dict[str, Any] = {"num_labels": 1, "max_position_embeddings": 128, **changes}
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, pad_token_id=pad, initializer_range=0.3, **settings,
    )  # fmt: skip
    (LlamaForCausalLM if causal else LlamaForSequenceClassification)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(folder)
    own.chat_template = template
    own.pad_token = None if pad is None else own.convert_ids_to_tokens(pad)
    own.save_pretrained(folder)
    return folder


def alone(folder: Path, prompt: Prompt, texts: Sequence[str]) -> list[float]:
    """Each text's logit by transformers itself, unpadded, one at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for text in texts:
        if tokenizer.chat_template:
            chat = [{"role": m.role, "content": m.content} for m in prompt.messages]
            chat.append({"role": "assistant", "content": text})
            ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
        else:
            ids = tokenizer("\n".join(m.content for m in prompt.messages) + text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores.append(float(model(input_ids=ids).logits[0, 0]))
    return scores


def reward_judge(folder: Path, **params: Any) -> PointwiseJudge:
    judge = load_judge(spec("judges.reward_model:RewardModelJudge", model=str(folder), device="cpu", **params), [])
    assert isinstance(judge, PointwiseJudge)
    return judge


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("pad", [None, 0, 2])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_batched_rewards_equal_those_one_by_one(
    tmp_path: Path, tokenizer: Any, template: str | None, pad: int | None, batch_size: int
) -> None:
    """With and without a padding id; with the template each text ends in the end token, which is also the padding
    where pad = 2. A causal model's score of an unpadded text is the truth.
    """
    folder = build(tokenizer, tmp_path, pad=pad, template=template)
    other = Prompt("q", (Message("system", "Be kind."), Message("user", "Hello")), (1,))
    judge = reward_judge(folder, batch_size=batch_size)
    items = [(PROMPT, answers(*TEXTS)), (other, answers("Good day", "A dog"))]
    first, second = judge.score_batch(items)
    assert first == pytest.approx(alone(folder, PROMPT, TEXTS), abs=1e-5)
    assert second == pytest.approx(alone(folder, other, ("Good day", "A dog")), abs=1e-5)
    assert len({round(score, 4) for score in first if isinstance(score, float)}) == len(TEXTS), "scores must differ"
    assert judge.score(PROMPT, answers("Hi")) == pytest.approx([first[3]], abs=1e-5)


def test_an_encoder_does_not_see_its_padding(tmp_path: Path, tokenizer: Any) -> None:
    """BERT attends in both directions: a wrong attention mask would show, which a causal model hides."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scores = reward_judge(tmp_path, batch_size=6).score(PROMPT, answers(*TEXTS))
    assert scores == pytest.approx(alone(tmp_path, PROMPT, TEXTS), abs=1e-5)
    assert len({round(score, 4) for score in scores if isinstance(score, float)}) == len(TEXTS), "scores must differ"


@pytest.mark.parametrize("params", [{"max_length": 20}, {}])
def test_what_is_too_long_abstains(tmp_path: Path, tokenizer: Any, params: dict[str, int]) -> None:
    folder = build(tokenizer, tmp_path, max_position_embeddings=128 if params else 20)
    results = judge_all(
        reward_judge(folder, **params), {"p": PROMPT}, answers("Hi", "A dog ran. " * 20), max_abstain=0.5
    )
    assert isinstance(results[0], Verdict)
    assert results[1] == Abstain("p", 1, "longer than the reward model's 20 tokens")


def test_a_classifier_with_two_outputs_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(JudgeError, match="has 2 outputs; a reward model has 1"):
        reward_judge(build(tokenizer, tmp_path, num_labels=2))


def test_a_model_without_a_reward_head_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    judge = reward_judge(build(tokenizer, tmp_path, causal=True))
    with pytest.raises(JudgeError, match=r"lacks weights \(score.weight\)"):
        judge_all(judge, {"p": PROMPT}, answers("Hi"), max_abstain=1)


def test_a_device_that_is_not_there_ends_the_run(tmp_path: Path, tokenizer: Any) -> None:
    folder = build(tokenizer, tmp_path)
    judge = load_judge(spec("judges.reward_model:RewardModelJudge", model=str(folder), device="no_device"), [])
    with pytest.raises(JudgeError, match="cannot load"):
        judge_all(judge, {"p": PROMPT}, answers("Hi"), max_abstain=1)


def test_a_missing_model_and_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="cannot load") as caught:
        reward_judge(tmp_path)
    assert "\n" not in str(caught.value)
    for key in ("batch_size", "max_length"):
        with pytest.raises(JudgeError, match=key):
            reward_judge(tmp_path, **{key: 0})
