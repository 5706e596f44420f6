"""A dataset's rows are tokenised for the policy, and what must not be trained on is left out and counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import SHARED, byte_tokenizer
from offline import ENDS, pairs_of, reading, write
from test_loop import HELD_OUT, TRAIN

from online_dpo.answers import AnswerEncoder
from online_dpo.dataset_rows import DatasetRows, read_dataset
from online_dpo.errors import DataError
from online_dpo.source_spec import DatasetSpec
from online_dpo.templates import use_template
from online_dpo.types import Message, Prompt


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def rows_in(path: Path, answers_alone: bool = False, limit: int | None = None, **changes: Any) -> DatasetRows:
    return read_dataset(
        DatasetSpec(path=str(path), limit=limit), reading(path.parent, **changes), answers_alone=answers_alone
    )


def test_answers_follow_their_prompts_tokens_and_end(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "Say yes", "chosen": "yes", "rejected": "no"}
    found = rows_in(write(tmp_path / "p.jsonl", [row]))
    [one] = found.rows
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(list(one.prompt.token_ids)) == "Say yes"
    chosen, rejected = one.candidates("here")
    assert (chosen.prompt_id, chosen.index, chosen.text, chosen.logprobs) == ("here", 0, "yes", ())
    assert (rejected.prompt_id, rejected.index, rejected.text, rejected.finish_reason) == ("here", 1, "no", "stop")
    assert tokenizer.decode(list(chosen.token_ids)) == " yes</s>"
    assert tokenizer.decode(list(rejected.token_ids)) == " no</s>"
    assert one.prompt.id == f"{found.digest[:8]}:a"


def test_a_row_of_the_runs_own_prompt_has_that_prompts_tokens(tmp_path: Path) -> None:
    """The fake prompts' tokens are no tokenizer's: they can only have been taken over."""
    found = rows_in(write(tmp_path / "p.jsonl", pairs_of(TRAIN[:2]) + pairs_of(TRAIN[:1])))
    assert {prompt_id: len(rows) for prompt_id, rows in found.of_prompt.items()} == {TRAIN[0].id: 2, TRAIN[1].id: 1}
    assert found.of_prompt[TRAIN[1].id][0].prompt.token_ids == TRAIN[1].token_ids
    assert len({row.prompt.id for row in found.rows}) == 3


def test_held_out_prompts_never_come_in(tmp_path: Path) -> None:
    found = rows_in(write(tmp_path / "p.jsonl", pairs_of([*TRAIN, *HELD_OUT])))
    assert found.dropped["held_out"] == 3
    assert [row.prompt.messages for row in found.rows] == [prompt.messages for prompt in TRAIN]


def test_the_experiments_system_message_is_no_part_of_a_prompts_identity(tmp_path: Path) -> None:
    """The run's prompts carry it, the dataset's do not; a row of another prompt is given it."""
    be = Message("system", "Be kind.")
    train = tuple(replace(prompt, messages=(be, *prompt.messages)) for prompt in TRAIN)
    held_out = tuple(replace(prompt, messages=(be, *prompt.messages)) for prompt in HELD_OUT)
    other = {"prompt": "Another", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "p.jsonl", [*pairs_of([TRAIN[0], HELD_OUT[0]]), other])
    encoder = AnswerEncoder(use_template(byte_tokenizer(), "dialogue"), ENDS)
    found = rows_in(path, train=train, held_out=held_out, encoder=encoder, system="Be kind.")
    assert found.dropped["held_out"] == 1
    assert list(found.of_prompt) == [TRAIN[0].id]
    assert [row.prompt.messages for row in found.rows] == [train[0].messages, (be, Message("user", "Another"))]


def test_answers_given_under_another_system_message_serve_the_runs_prompt(tmp_path: Path) -> None:
    """As another model's exported answers: the run's prompt is plain text, and its tokens are taken."""
    [row] = pairs_of(TRAIN[:1])
    chat = [{"role": "system", "content": "Go on."}, {"role": "user", "content": row["prompt"]}]
    held_out = [chat[0], {"role": "user", "content": HELD_OUT[0].text}]
    path = write(tmp_path / "p.jsonl", [row | {"prompt": chat}, row | {"prompt": held_out}])
    found = rows_in(path)
    assert found.of_prompt[TRAIN[0].id][0].prompt.token_ids == TRAIN[0].token_ids
    assert found.dropped["held_out"] == 1


def test_what_does_not_fit_is_dropped_and_counted(tmp_path: Path) -> None:
    """Tokens are bytes. Prompt 10, answers " yes</s>" 5 and " no</s>" 4: 15 fit in 15. Nothing is cut."""
    fits = {"prompt": "p" * 10, "chosen": "yes", "rejected": "no"}
    rows = [
        fits,
        fits | {"prompt": "p" * 11},
        fits | {"rejected": "nooo"},
        fits | {"chosen": "y</s>s"},
        fits | {"rejected": "yes"},
    ]
    found = rows_in(write(tmp_path / "p.jsonl", rows), longest_prompt=10, longest=15)
    kept = {key: count for key, count in found.dropped.items() if count}
    assert kept == {"prompt_too_long": 1, "too_long": 1, "has_end": 1, "identical": 1}
    assert len(found.rows) == 1
    with pytest.raises(DataError, match=r"p\.jsonl: no usable row \(dropped: .*2 too long"):
        rows_in(tmp_path / "p.jsonl", longest_prompt=10, longest=14)


def test_dialogues_want_a_template(tmp_path: Path) -> None:
    rows = [
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        }
    ]
    path = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(
        DataError, match=r"row '1': the model's tokenizer has no chat template.*prompts\.template: dialogue"
    ):
        rows_in(path)
    found = rows_in(path, encoder=AnswerEncoder(use_template(byte_tokenizer(), "dialogue"), ENDS))
    tokenizer = byte_tokenizer()
    [row] = found.rows
    whole = [*row.prompt.token_ids, *row.chosen.token_ids]
    assert tokenizer.decode(whole) == "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d</s>"


def test_the_digest_is_of_every_text_and_token(tmp_path: Path) -> None:
    rows = pairs_of(TRAIN)
    first = rows_in(write(tmp_path / "p.jsonl", rows))
    assert rows_in(write(tmp_path / "p.jsonl", rows)).digest == first.digest
    changed = [rows[0] | {"rejected": "Changed."}, *rows[1:]]
    others = [
        rows_in(write(tmp_path / "q.jsonl", changed)),
        rows_in(write(tmp_path / "q.jsonl", rows[:-1])),
        rows_in(write(tmp_path / "q.jsonl", rows), encoder=AnswerEncoder(byte_tokenizer(), (1,))),
        rows_in(write(tmp_path / "q.jsonl", rows), answers_alone=True),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 5


def test_answers_alone_have_no_rejected_one(tmp_path: Path) -> None:
    found = rows_in(write(tmp_path / "p.jsonl", [{"prompt": "hi", "answer": "hello"}]), answers_alone=True)
    [row] = found.rows
    assert row.rejected is None
    assert [candidate.text for candidate in row.candidates("x")] == ["hello"]


@pytest.mark.parametrize(
    ("name", "limit", "longest"),
    [
        ("politeness.json", 200, 512),
        pytest.param("tldr-batch13.jsonl", 40, 4000, marks=pytest.mark.slow),
        pytest.param("helpful-base.test.jsonl.gz", 60, 512, marks=pytest.mark.slow),
    ],
)
def test_real_pairs(name: str, limit: int, longest: int, stories: Path) -> None:
    """Every row is kept or counted; what is kept fits, ends with the model's end token and decodes to its texts."""
    from online_dpo.model_config import end_token_ids
    from online_dpo.models import load_tokenizer

    path = SHARED / "pairs" / name
    if not path.is_file():
        pytest.skip("the preference pairs (../shared/data/pairs) are not on this machine")
    tokenizer: Any = use_template(load_tokenizer(stories), "dialogue")
    changes: dict[str, Any] = {
        "encoder": AnswerEncoder(tokenizer, end_token_ids(stories)), "longest": longest, "longest_prompt": longest
    }  # fmt: skip
    found = rows_in(path, limit=limit, **changes)
    dropped = sum(found.dropped.get(reason, 0) for reason in ("prompt_too_long", "too_long", "has_end", "held_out"))
    assert len(found.rows) + dropped == limit
    assert len(found.rows) >= limit / 3
    for row in found.rows:
        assert row.rejected is not None
        for answer in (row.chosen, row.rejected):
            assert len(row.prompt.token_ids) + len(answer.token_ids) <= longest
            assert answer.token_ids[-1] == tokenizer.eos_token_id
            assert tokenizer.eos_token_id not in answer.token_ids[:-1]
            text = tokenizer.decode([*row.prompt.token_ids, *answer.token_ids[:-1]])
            assert text.endswith(f"\n\nAssistant: {answer.text}")
    own = Prompt("p", found.rows[0].prompt.messages, found.rows[0].prompt.token_ids)
    assert rows_in(path, limit=limit, **changes, held_out=(own,)).dropped["held_out"] >= 1
