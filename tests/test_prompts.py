"""Prompts are read, tokenised once, split by their ids alone and dealt to rounds without repetition."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from online_dpo.config import PromptsSpec
from online_dpo.errors import DataError
from online_dpo.prompts import encode, load_prompts, prompts_for_round, split
from online_dpo.templates import use_template
from online_dpo.types import Message, Prompt

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "data" / "models" / "stories260k"
BOS, EOS = 0, 1
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(template: str | None = None, end: bool = False) -> Any:
    """A byte tokenizer: id 0 `<s>`, id 1 `</s>`, then one id a byte. It adds `<s>`, and `</s>` when `end`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": BOS, "</s>": EOS, **{symbol: index + 2 for index, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")  # noqa: S106
    fast.chat_template = template
    return fast


PLAIN, CHAT = make_tokenizer(), make_tokenizer(TEMPLATE)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps its tables in this test's folder, not in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def spec(path: Path | str, **changes: Any) -> PromptsSpec:
    return PromptsSpec(**{"path": str(path), "per_round": 1, "held_out": 1, **changes})


def texts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"prompt number {number}"} for number in range(count)]


def all_texts(path: Path, **changes: Any) -> list[str]:
    """The texts of all prompts of `path`, sorted."""
    prompts = load_prompts(spec(path, **changes), PLAIN)
    return sorted(prompt.text for prompt in prompts.train + prompts.held_out)


# --- tokenising ---


def test_plain_text_gets_one_begin_token() -> None:
    """Byte ids follow the begin token; neither a text that begins with `<s>` nor an added `</s>` changes that."""
    ids = encode([Message("user", "hi")], PLAIN)
    assert ids[0] == BOS
    assert PLAIN.decode(ids[1:]) == "hi"
    assert encode([Message("user", "<s>hi")], PLAIN) == ids
    assert encode([Message("user", "hi")], make_tokenizer(end=True)) == ids


def test_chat_template_is_applied_with_one_begin_token() -> None:
    messages = [Message("system", "be brief"), Message("user", "hi")]
    ids = encode(messages, CHAT)
    assert CHAT.decode(ids) == "<s>[system]be brief[user]hi[assistant]"
    assert ids.count(BOS) == 1


def test_real_tokenizer_without_template() -> None:
    if not STORIES.is_dir():
        pytest.skip("the trained test model is not in ../shared/data/models/stories260k")
    from online_dpo.models import load_tokenizer

    tokenizer: Any = load_tokenizer(STORIES)
    ids = encode([Message("user", "Once upon a time")], tokenizer)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


def test_messages_that_do_not_fit_the_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chat template"):
        encode([Message("system", "x"), Message("user", "hi")], PLAIN)
    with pytest.raises(DataError, match=r"here: the model's chat template refuses it: .*no tools"):
        encode([Message("tool", "42")], CHAT, "here")
    path = write_rows(tmp_path / "p.jsonl", texts(3))
    with pytest.raises(DataError, match=r"without `prompts\.system`"):
        load_prompts(spec(path, system="be brief"), PLAIN)


def test_prompts_are_tokenised_and_carry_their_messages(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", texts(3))
    loaded = load_prompts(spec(path, system="be brief"), CHAT)
    assert loaded.chat
    for prompt in loaded.train + loaded.held_out:
        assert prompt.messages == (Message("system", "be brief"), Message("user", prompt.text))
        assert CHAT.decode(prompt.token_ids) == f"<s>[system]be brief[user]{prompt.text}[assistant]"
    assert not load_prompts(spec(path), PLAIN).chat


# --- formats ---


def test_every_file_format(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "first, with a comma", "n": 1},
        {"prompt": 'second "quoted"', "n": 2},
        {"prompt": "Ünïcödé\n", "n": 3},
    ]
    expected = sorted(row["prompt"] for row in rows)
    table = datasets.Dataset.from_list(rows)
    write_rows(tmp_path / "p.jsonl", rows)
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress((tmp_path / "p.jsonl").read_bytes()))
    table.to_csv(tmp_path / "p.csv", index=False)
    table.to_csv(tmp_path / "p.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "p.parquet")
    for name in ("p.jsonl", "p.json", "p.jsonl.gz", "p.csv", "p.tsv", "p.parquet"):
        assert all_texts(tmp_path / name) == expected, name


def test_folders(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(texts(3))
    expected = sorted(row["prompt"] for row in texts(3))
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0, 1])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    write_rows(tmp_path / "files" / "train.jsonl", texts(3))
    for name in ("saved", "splits", "files"):
        assert all_texts(tmp_path / name) == expected, name
    assert all_texts(tmp_path / "splits", split="test") == expected[:2]
    with pytest.raises(DataError, match=r"no split 'tets' \(did you mean 'test'\?\); splits: train, test"):
        load_prompts(spec(tmp_path / "splits", split="tets"), PLAIN)


def test_text_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\nthree\n")
    assert all_texts(tmp_path / "p.txt") == ["one", "three", "two"]
    assert load_prompts(spec(tmp_path / "p.txt"), PLAIN).dropped["empty"] == 1


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    """`None`, `12` and `007` would become a missing value and numbers if the reader guessed types."""
    (tmp_path / "p.csv").write_text('prompt,id\nNone,007\n12,08\nNA,9\n"",10\n')
    loaded = load_prompts(spec(tmp_path / "p.csv", id_column="id"), PLAIN)
    assert {prompt.id: prompt.text for prompt in loaded.train + loaded.held_out} == {
        "007": "None",
        "08": "12",
        "9": "NA",
    }
    assert loaded.dropped == {"empty": 1, "duplicate": 0, "too_long": 0}


def test_relative_path_is_found_beside_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiment").mkdir()
    write_rows(tmp_path / "experiment" / "p.jsonl", texts(3))
    monkeypatch.chdir(tmp_path)
    assert len(load_prompts(spec("p.jsonl"), PLAIN, folders=[tmp_path / "experiment"]).train) == 2
    assert len(load_prompts(spec("experiment/p.jsonl"), PLAIN).train) == 2


# --- rows ---


def test_list_of_messages(tmp_path: Path) -> None:
    conversation = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": conversation}, {"prompt": conversation[:1]}, {"prompt": []}])
    loaded = load_prompts(spec(path), CHAT)
    found = {len(prompt.messages): CHAT.decode(prompt.token_ids) for prompt in loaded.train + loaded.held_out}
    assert found == {3: "<s>[user]a[assistant]b[user]c[assistant]", 1: "<s>[user]a[assistant]"}
    assert loaded.dropped["empty"] == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "row 1.*ends with an assistant turn",
        ),
        ([{"role": "system", "content": "a"}], "no user's turn"),
        ([{"role": "user"}], "every message needs a text `role` and a text `content`"),
        ([{"role": "user", "content": 3}], "every message needs"),
        (["hello"], "every message needs"),
        (12, "text or a list of {role, content} is needed, found int"),
    ],
)
def test_rows_that_are_no_prompts(tmp_path: Path, value: Any, message: str) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": value}])
    with pytest.raises(DataError, match=message):
        load_prompts(spec(path), CHAT)


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    """Two repeats, two without text, one of 21 tokens (begin token and 20 bytes) where 20 are allowed."""
    values = ["a", "a", "b", "a", "  ", None, "x" * 20, "y" * 19]
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": value} for value in values])
    loaded = load_prompts(spec(path, max_tokens=20), PLAIN)
    assert loaded.dropped == {"empty": 2, "duplicate": 2, "too_long": 1}
    assert sorted(prompt.text for prompt in loaded.train + loaded.held_out) == ["a", "b", "y" * 19]


def test_ids(tmp_path: Path) -> None:
    """Without `id_column` an id depends on the row's own messages alone; a repeat keeps the smallest given id."""
    path = write_rows(
        tmp_path / "p.jsonl", [{"prompt": "a", "key": 2}, {"prompt": "b", "key": 1}, {"prompt": "b", "key": 0}]
    )
    given_ids = load_prompts(spec(path, id_column="key"), PLAIN)
    assert {prompt.text: prompt.id for prompt in given_ids.train + given_ids.held_out} == {"a": "2", "b": "0"}
    hashed = load_prompts(spec(path), PLAIN)
    # printf '%s' '[["user", "a"]]' | sha256sum | cut -c -16
    assert {prompt.text: prompt.id for prompt in hashed.train + hashed.held_out}["a"] == "050d8ef56e888db0"
    with_system = load_prompts(spec(path, system="s"), CHAT)
    assert {prompt.id for prompt in with_system.train} == {prompt.id for prompt in hashed.train}


def test_ids_that_are_wrong(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "a", "key": "x"}, {"prompt": "b", "key": "x"}])
    with pytest.raises(DataError, match="two different prompts have the id 'x'"):
        load_prompts(spec(path, id_column="key"), PLAIN)
    with pytest.raises(DataError, match=r"id_column: no column 'keys' \(did you mean 'key'\?\); columns: prompt, key"):
        load_prompts(spec(path, id_column="keys"), PLAIN)
    path = write_rows(tmp_path / "q.jsonl", [{"prompt": "a", "key": "x"}, {"prompt": "b", "key": None}])
    with pytest.raises(DataError, match=r"row 2: column 'key' .*is empty"):
        load_prompts(spec(path, id_column="key"), PLAIN)


def test_too_few_prompts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [*texts(5), {"prompt": ""}])
    with pytest.raises(DataError, match=r"5 usable prompts \(dropped: 1 empty\).*held_out is 5: at least 6"):
        load_prompts(spec(path, held_out=5), PLAIN)
    with pytest.raises(DataError, match=r"3 of them for training after held_out 2, but prompts\.per_round is 4"):
        load_prompts(spec(path, held_out=2, per_round=4), PLAIN)
    assert len(load_prompts(spec(path, held_out=2, per_round=3), PLAIN).train) == 3


# --- what cannot be read ---


def test_missing_things_suggest_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "reviews.jsonl", [{"question": "a", "answer": "b"}])
    for name in ("data/revews.jsonl", str(tmp_path / "data" / "revews.jsonl"), "data/reviews"):
        with pytest.raises(DataError, match=r"no prompts at .* \(did you mean 'reviews\.jsonl'\?\)"):
            load_prompts(spec(name), PLAIN)
    with pytest.raises(
        DataError, match=r"no column 'questions' \(did you mean 'question'\?\); columns: question, answer"
    ):
        load_prompts(spec("data/reviews.jsonl", column="questions"), PLAIN)
    with pytest.raises(DataError, match=r'Unknown split "test"'):
        load_prompts(spec("data/reviews.jsonl", split="test"), PLAIN)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt" 2}\n', "cannot be read"),
        ("p.jsonl", b"", "is empty"),
        ("p.csv", b"\n", "cannot be read"),
        ("p.parquet", b"PAR1 not really", "cannot be read"),
        ("p.xlsx", b"x", r"a prompt file is one of \.jsonl"),
        ("p.jsonl.gz", b"not gzip at all", "cannot be read"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_prompts(spec(tmp_path / name), PLAIN)
    assert "\n" not in str(caught.value)


ASK = """
import time
from online_dpo import prompts
from online_dpo.config import PromptsSpec
from online_dpo.errors import DataError
prompts.HUB_TIMEOUT = 0.5
started = time.monotonic()
try:
    prompts.load_prompts(PromptsSpec(path="someorg/some-prompts"), None)
except DataError as error:
    print(error)
print(time.monotonic() - started)
"""


@pytest.mark.parametrize("offline", ["1", ""])
def test_hub_dataset_out_of_reach(tmp_path: Path, offline: str) -> None:
    """Offline by the environment, and with a hub that accepts the connection and never answers: both end soon."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        result = subprocess.run(
            [sys.executable, "-c", ASK],
            env={**os.environ, "HF_HUB_OFFLINE": offline, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert result.returncode == 0, result.stderr
    message, seconds = result.stdout.splitlines()
    assert "no hub dataset 'someorg/some-prompts'" in message
    assert "give a file or folder instead" in message
    assert float(seconds) < 30


# --- splitting and dealing ---


def made(ids: Sequence[str]) -> list[Prompt]:
    return [Prompt(prompt_id, (Message("user", prompt_id),), (1,)) for prompt_id in ids]


IDS = st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=40, unique=True)


@given(IDS, st.data())
def test_split_is_disjoint_and_ignores_order(ids: list[str], data: st.DataObject) -> None:
    held_out = data.draw(st.integers(1, len(ids) - 1))
    shuffled = data.draw(st.permutations(ids))
    train, held = split(made(ids), held_out)
    assert split(made(shuffled), held_out) == (train, held)
    assert len(held) == held_out
    assert sorted(prompt.id for prompt in train + held) == sorted(ids)
    # A smaller held-out set is part of a larger one.
    assert set(split(made(ids), held_out - 1)[1]) <= set(held)


def test_file_order_does_not_matter(tmp_path: Path) -> None:
    rows = texts(30)
    first = load_prompts(spec(write_rows(tmp_path / "a.jsonl", rows), held_out=10), PLAIN)
    random.Random(0).shuffle(rows)
    assert load_prompts(spec(write_rows(tmp_path / "b.jsonl", rows), held_out=10), PLAIN) == first


@given(st.integers(1, 23), st.data())
def test_rounds_walk_permutations(count: int, data: st.DataObject) -> None:
    """No prompt twice in a round; and no prompt comes k + 1 times before every prompt came k times.

    After R rounds R·per_round prompts are dealt: each came ⌊R·per_round/count⌋ times or once more.
    """
    train = made([f"p{number}" for number in range(count)])
    per_round = data.draw(st.integers(1, count))
    seed = data.draw(st.integers(0, 2**31 - 1))
    seen: Counter[str] = Counter()
    for index in range(1, 8):
        dealt = prompts_for_round(train, seed, index, per_round)
        assert len({prompt.id for prompt in dealt}) == len(dealt) == per_round
        seen.update(prompt.id for prompt in dealt)
        times = index * per_round // count
        assert all(times <= seen[prompt.id] <= times + 1 for prompt in train)


def test_rounds_depend_on_the_seed_and_not_on_the_order() -> None:
    train = made([f"p{number}" for number in range(50)])
    first = prompts_for_round(train, 0, 3, 20)
    assert prompts_for_round(train[::-1], 0, 3, 20) == first
    assert prompts_for_round(train, 1, 3, 20) != first
    assert prompts_for_round(train, 0, 1, 50) != prompts_for_round(train, 0, 2, 50)


def test_first_place_is_uniform() -> None:
    """Over 2000 seeds each of 10 prompts comes first 200 times on average, ± 5 standard errors (√180 = 13.4)."""
    train = made([f"p{number}" for number in range(10)])
    first = Counter(prompts_for_round(train, seed, 1, 1)[0].id for seed in range(2000))
    assert all(abs(first[prompt.id] - 200) < 67 for prompt in train)


def test_rounds_that_cannot_be_dealt() -> None:
    with pytest.raises(DataError, match="per_round is 3 but there are 2"):
        prompts_for_round(made(["a", "b"]), 0, 1, 3)
    with pytest.raises(ValueError, match="counted from 1"):
        prompts_for_round(made(["a", "b"]), 0, 0, 1)


def test_reviews_load_with_the_experiments_sizes() -> None:
    path = ROOT / "experiments" / "prompts" / "reviews.jsonl"
    loaded = load_prompts(spec(path, id_column="id", held_out=64, per_round=96), CHAT)
    assert loaded.dropped == {"empty": 0, "duplicate": 0, "too_long": 0}
    kinds = Counter(prompt.id.split("-")[0] for prompt in loaded.held_out)
    assert min(kinds.values()) >= 10


# --- preference files and dialogues ---


def dialogue_tokenizer() -> Any:
    return use_template(make_tokenizer(), "dialogue")


def test_a_preference_file_gives_its_prompts(tmp_path: Path) -> None:
    """HH-RLHF has no prompt column: the turns before the answers are the prompt, once for all its pairs."""
    asked = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    rows = [
        {"chosen": f"{asked} yes", "rejected": f"{asked} no"},
        {"chosen": f"{asked} sure", "rejected": f"{asked} never"},
        {"chosen": "\n\nHuman: hi\n\nAssistant: x", "rejected": "\n\nHuman: hi\n\nAssistant: y"},
        {"chosen": "\n\nHuman: z\n\nAssistant: x", "rejected": "\n\nHuman: other\n\nAssistant: y"},
    ]
    path = write_rows(tmp_path / "hh.jsonl", rows)
    loaded = load_prompts(spec(path, system="Be kind."), dialogue_tokenizer())
    found = {PLAIN.decode(prompt.token_ids) for prompt in loaded.train + loaded.held_out}
    assert found == {
        "<s>\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        "<s>Be kind.\n\nHuman: hi\n\nAssistant:",  # as before plain text
    }
    assert loaded.dropped == {"empty": 0, "duplicate": 1, "too_long": 0, "prompts_differ": 1}
    assert loaded.chat
    with pytest.raises(DataError, match=r"no chat template.*prompts\.template: dialogue"):
        load_prompts(spec(path), PLAIN)


def test_other_prompt_columns_of_preference_files(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i}?", "chosen": "x", "rejected": "y"} for i in range(3)]
    path = write_rows(tmp_path / "q.jsonl", rows)
    assert all_texts(path) == [f"What is {i}?" for i in range(3)]
    other = write_rows(tmp_path / "o.jsonl", [{"question": "a", "chosen": "x"}])
    with pytest.raises(DataError, match="no column 'questn'"):
        load_prompts(spec(other, column="questn"), PLAIN)


def test_a_text_of_turns_is_read_as_turns_where_a_template_writes_them(tmp_path: Path) -> None:
    """Behind no template it stays the text that it is."""
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": text}, {"prompt": "plain"}])
    assert text in all_texts(path)
    chats = {CHAT.decode(prompt.token_ids) for group in _both(path, CHAT) for prompt in group}
    assert chats == {"<s>[user]a[assistant]b[user]c[assistant]", "<s>[user]plain[assistant]"}
    dialogues = {PLAIN.decode(prompt.token_ids) for group in _both(path, dialogue_tokenizer()) for prompt in group}
    assert dialogues == {f"<s>{text}", "<s>\n\nHuman: plain\n\nAssistant:"}
    answered = write_rows(tmp_path / "a.jsonl", [{"prompt": f"{text} d"}])
    with pytest.raises(DataError, match="row 1: column 'prompt': ends with an assistant turn"):
        load_prompts(spec(answered), CHAT)


def _both(path: Path, tokenizer: Any) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    loaded = load_prompts(spec(path), tokenizer)
    return loaded.train, loaded.held_out


@pytest.mark.slow
def test_real_dialogues() -> None:
    """HH-RLHF helpful-base: 2354 rows, 9 whose prompts differ, 2 identical pairs; every row is a prompt or counted."""
    path = ROOT.parent / "shared" / "data" / "pairs" / "helpful-base.test.jsonl.gz"
    if not path.is_file():
        pytest.skip("the human comparisons (../shared/data/pairs) are not on this machine")
    loaded = load_prompts(spec(path, held_out=100, max_tokens=100_000), dialogue_tokenizer())
    prompts = loaded.train + loaded.held_out
    assert (loaded.dropped["prompts_differ"], loaded.dropped["identical"]) == (9, 2)
    assert len(prompts) + sum(loaded.dropped.values()) == 2354
    for prompt in prompts[:50]:
        assert PLAIN.decode(prompt.token_ids).startswith("<s>\n\nHuman: ")
        assert PLAIN.decode(prompt.token_ids).endswith("\n\nAssistant:")
