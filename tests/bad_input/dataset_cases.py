"""Preference datasets: pairs that are none, columns that are not there, files that are no files of rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from case import Case
from conftest import SHARED

from experiments import write_rows, written
from online_dpo.prompts import message_id, split
from online_dpo.types import Message, Prompt

Row = Mapping[str, Any]
PAIRS = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, never {i}."} for i in range(6)]
USER = {"role": "user", "content": "One?"}
ASSISTANT = {"role": "assistant", "content": "Two."}
OWN_PROMPTS = [{"prompt": f"Tell me of number {i}."} for i in range(9)]


def offline(rows: Sequence[Row] = PAIRS, name: str = "pairs.jsonl", **settings: Any) -> Callable[[Path], list[str]]:
    """`check` of an arm that trains on these rows; `settings`: keys of the dataset."""

    def arrange(folder: Path) -> list[str]:
        write_rows(folder / name, rows)
        return written(folder, arms={"offline": {"source": {"dataset": {"path": name, **settings}}}})

    return arrange


def changed(number: int, **changes: Any) -> list[Row]:
    """`PAIRS` with one row changed; what is None there is null."""
    return [*PAIRS[:number], {**PAIRS[number], **changes}, *PAIRS[number + 1 :]]


def without(*columns: str) -> list[Row]:
    return [{key: value for key, value in row.items() if key not in columns} for row in PAIRS]


def renamed(old: str, new: str) -> list[Row]:
    return [{new if key == old else key: value for key, value in row.items()} for row in PAIRS]


def every(**changes: Any) -> list[Row]:
    return [{**row, **changes} for row in PAIRS]


def file(name: str, content: bytes) -> Callable[[Path], list[str]]:
    """`check` of an arm that trains on a file of these bytes."""

    def arrange(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return written(folder, arms={"offline": {"source": {"dataset": name}}})

    return arrange


def source(**source: Any) -> Callable[[Path], list[str]]:
    """`check` of an arm with this source, `PAIRS` beside it."""

    def arrange(folder: Path) -> list[str]:
        write_rows(folder / "pairs.jsonl", PAIRS)
        return written(folder, arms={"offline": {"source": source}})

    return arrange


def evaluated(rows: Sequence[Row], **settings: Any) -> Callable[[Path], list[str]]:
    """`check` of an experiment that measures by these pairs."""

    def arrange(folder: Path) -> list[str]:
        write_rows(folder / "pairs.jsonl", rows)
        return written(folder, evaluation={"pairs": {"path": "pairs.jsonl", **settings}})

    return arrange


def sft(rows: Sequence[Row], **settings: Any) -> Callable[[Path], list[str]]:
    def arrange(folder: Path) -> list[str]:
        write_rows(folder / "answers.jsonl", rows)
        return written(folder, sft={"dataset": "answers.jsonl", **settings})

    return arrange


def arm(**arm: Any) -> Callable[[Path], list[str]]:
    """`check` of one arm of these settings, `PAIRS` beside it."""

    def arrange(folder: Path) -> list[str]:
        write_rows(folder / "pairs.jsonl", PAIRS)
        return written(folder, arms={"offline": arm})

    return arrange


def saved(split: str) -> Callable[[Path], list[str]]:
    """A folder that `datasets` saved, with splits train and test."""

    def arrange(folder: Path) -> list[str]:
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.Dataset.from_list(PAIRS)
        datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(folder / "pairs"))
        return written(folder, arms={"offline": {"source": {"dataset": {"path": "pairs", "split": split}}}})

    return arrange


def audit(rows: Sequence[Row], *options: str) -> Callable[[Path], list[str]]:
    """`judge audit` on these pairs."""

    def arrange(folder: Path) -> list[str]:
        write_rows(folder / "pairs.jsonl", rows)
        judge = ["--judge", "judges.length:LengthJudge", "--set", "unit=characters"]
        return ["judge", "audit", *judge, "--pairs", "pairs.jsonl", "--quiet", *options]

    return arrange


def real(name: str) -> Callable[[Path], list[str]]:
    """`check` of an arm that trains on a real dataset by its whole path."""

    def arrange(folder: Path) -> list[str]:
        dataset = {"path": str(SHARED / "pairs" / name), "limit": 60}
        prompts = {"path": "prompts.jsonl", "per_round": 2, "held_out": 2, "template": "dialogue", "max_tokens": 4000}
        return written(
            folder,
            model=str(SHARED / "models" / "stories260k"),
            prompts=prompts,
            arms={"offline": {"source": {"dataset": dataset}}},
        )

    return arrange


def no_file(folder: Path) -> list[str]:
    write_rows(folder / "paris.jsonl", PAIRS)
    return written(folder, arms={"offline": {"source": {"dataset": "pairs.jsonl"}}})


def own_pairs(held_out: bool) -> list[Row]:
    """A pair for each prompt that an experiment with two held-out prompts holds out, or for each of the others."""
    asked = [(Message("user", row["prompt"]),) for row in OWN_PROMPTS]
    parts = split([Prompt(message_id(messages), messages, ()) for messages in asked], 2)
    return [{"prompt": prompt.text, "chosen": "Yes.", "rejected": "No."} for prompt in parts[held_out]]


def two_arms(folder: Path) -> list[str]:
    """The fault is in the second one's."""
    write_rows(folder / "good.jsonl", PAIRS)
    write_rows(folder / "bad.jsonl", without("rejected"))
    arms = {"first": {"source": {"dataset": "good.jsonl"}}, "second": {"source": {"dataset": "bad.jsonl"}}}
    return written(folder, arms=arms)


def spin_without_answers(folder: Path) -> list[str]:
    write_rows(folder / "pairs.jsonl", without("chosen"))
    return written(folder, arms={"a": {"source": {"spin": "pairs.jsonl"}}})


def audit_of_nothing(folder: Path) -> list[str]:
    return [part.replace("pairs.jsonl", "pears.jsonl") for part in audit(PAIRS)(folder)]


def audit_into_a_file(folder: Path) -> list[str]:
    (folder / "out").write_text("kept", encoding="utf-8")
    return audit(PAIRS, "-o", "out")(folder)


def mixture(rows: Sequence[Row]) -> Callable[[Path], list[str]]:
    def arrange(folder: Path) -> list[str]:
        write_rows(folder / "pairs.jsonl", rows)
        parts = [{"share": 0.5, "source": "current"}, {"share": 0.5, "source": {"dataset": "pairs.jsonl"}}]
        return written(folder, arms={"mixed": {"source": {"mixture": parts}}})

    return arrange


def dialogue(*turns: str) -> str:
    return "".join(f"\n\n{turn}" for turn in turns)


DIALOGUES = [
    {"chosen": dialogue(f"Human: {i}?", "Assistant: Yes."), "rejected": dialogue(f"Human: {i}?", "Assistant: No.")}
    for i in range(6)
]
SUMMARY = {"info": {"post": "A long post."}, "summaries": [{"text": "Short."}, {"text": "Shorter."}], "choice": 0}
LONG = "x" * 1_000_000

CASES: tuple[Case, ...] = (
    Case(
        "dataset: no such file, a like-named one beside",
        no_file,
        r"arm offline: no preference pairs at 'pairs.jsonl' \(did you mean 'paris.jsonl'\?\)",
    ),
    Case("dataset: no rows", offline([]), r"arm offline: pairs\.jsonl is empty"),
    Case(
        "dataset: one row where a round takes two",
        offline(PAIRS[:1]),
        r"pairs\.jsonl has 1 usable rows .*but prompts\.per_round is 2",
    ),
    Case(
        "dataset: no rejected answers",
        offline(without("rejected")),
        r"no preference pairs in columns prompt, chosen; known forms",
    ),
    Case("dataset: no chosen answers", offline(without("chosen")), r"no preference pairs in columns prompt, rejected"),
    Case("dataset: no prompts", offline(without("prompt")), r"row 1: column 'chosen': no prompt before the answer"),
    Case(
        "dataset: a misspelt column",
        offline(renamed("rejected", "regected")),
        r"columns prompt, chosen, regected \(is 'regected' meant to be 'rejected'\?\)",
    ),
    Case(
        "dataset: answers alone",
        offline([{"prompt": "a", "answer": "b"}]),
        r"no preference pairs in columns prompt, answer",
    ),
    Case(
        "dataset: two identical answers in every row",
        offline(every(chosen="Same.", rejected="Same.")),
        r"no usable preference pair \(dropped: 6 identical\)",
    ),
    Case(
        "dataset: answers that differ in white space alone",
        offline(every(chosen="Same.", rejected=" Same.\n")),
        r"dropped: 6 identical",
    ),
    Case(
        "dataset: two identical answers in one row",
        offline(changed(2, rejected="Yes, 2.")),
        r"5 rows, dropped: 1 identical",
        goes_on=True,
    ),
    Case("dataset: null answers in every row", offline(every(rejected=None)), r"dropped: 6 empty"),
    Case(
        "dataset: a null answer in one row",
        offline(changed(1, rejected=None)),
        r"5 rows, dropped: 1 empty",
        goes_on=True,
    ),
    Case("dataset: a null prompt", offline(changed(1, prompt=None)), r"5 rows, dropped: 1 empty", goes_on=True),
    Case("dataset: empty answers in every row", offline(every(chosen="  ")), r"dropped: 6 empty"),
    Case(
        "dataset: answers that are numbers",
        offline(every(chosen=1, rejected=2)),
        r"row 1: column 'chosen': text or a list of \{role, content\} is needed, found int",
    ),
    Case(
        "dataset: answers that are mappings",
        offline(every(chosen={"text": "a"}, rejected={"text": "b"})),
        r"row 1: column 'chosen': text or a list",
    ),
    Case("dataset: prompts that are numbers", offline(every(prompt=7)), r"row 1: column 'prompt': text or a list"),
    Case("dataset: one answer is a number", offline(changed(3, chosen=3)), r"pairs\.jsonl cannot be read|row 4"),
    Case("dataset: rows that are no mappings", file("pairs.jsonl", b'[1, 2]\n"a"\n'), r"pairs\.jsonl"),
    Case("dataset: rows of numbers", file("pairs.jsonl", b"1\n2\n3\n"), r"pairs\.jsonl"),
    Case(
        "dataset: a line that is cut off",
        file("pairs.jsonl", json.dumps(PAIRS[0]).encode() + b'\n{"prompt": "a", "cho'),
        r"pairs\.jsonl cannot be read",
    ),
    Case("dataset: not text", file("pairs.jsonl", bytes(range(256))), r"pairs\.jsonl is not UTF-8 \(line 2\)"),
    Case("dataset: parquet that is none", file("pairs.parquet", b"PAR1 not really"), r"pairs\.parquet cannot be read"),
    Case("dataset: parquet of no bytes", file("pairs.parquet", b""), r"pairs\.parquet is empty"),
    Case("dataset: gzip that is none", file("pairs.jsonl.gz", b"not gzip"), r"pairs\.jsonl\.gz cannot be read"),
    Case(
        "dataset: gzip that is cut off",
        file("pairs.jsonl.gz", gzip.compress(json.dumps(PAIRS[0]).encode() * 500)[:40]),
        r"pairs\.jsonl\.gz cannot be read",
    ),
    Case("dataset: a kind of file that nobody reads", file("pairs.xlsx", b"PK"), r"is one of \.jsonl"),
    Case("dataset: a pickle", file("pairs.pkl", b"\x80\x04."), r"is one of \.jsonl"),
    Case("dataset: a CSV without a header", file("pairs.csv", b"Question?,Yes.,No.\n"), r"split 'train' has no rows"),
    Case(
        "dataset: a CSV with ragged rows",
        file("pairs.csv", b"prompt,chosen,rejected\na,b,c\nd,e,f,g,h\n"),
        r"pairs\.csv cannot be read",
    ),
    Case(
        "dataset: an HTML page in place of the file",
        file("pairs.jsonl", b"<!DOCTYPE html><html>Not found</html>\n"),
        r"pairs\.jsonl cannot be read",
    ),
    Case(
        "dataset: a Git LFS pointer",
        file("pairs.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        r"pairs\.jsonl",
    ),
    Case(
        "dataset: a hub id without the hub",
        source(dataset="some-org/some-pairs"),
        r"no hub dataset 'some-org/some-pairs'",
    ),
    Case("dataset: a split that a file has not", offline(split="test"), r"split"),
    Case("dataset: a slice of a split", offline(split="train[:3]"), r"3 rows|split", goes_on=True),
    Case("dataset: a slice that is none", offline(split="train[:x]"), r"split|slice|cannot be read"),
    Case("dataset: a slice of nothing", offline(split="train[:0]"), r"split 'train\[:0\]' has no rows"),
    Case(
        "dataset: a split of a saved folder misspelt",
        saved("tset"),
        r"no split 'tset' \(did you mean 'test'\?\); splits: train, test",
    ),
    Case("dataset: a saved folder", saved("test"), r"6 rows", goes_on=True),
    Case("dataset: no limit", offline(limit=0), r"limit: .*greater than or equal to 1"),
    Case(
        "dataset: an unknown key",
        offline(splt="train"),
        r"unknown key 'arms\.offline\.source\.dataset\.splt' \(did you mean 'split'\?\)",
    ),
    Case("dataset: a path that is a number", source(dataset=7), r"dataset"),
    Case("dataset: a path that is empty", source(dataset=""), r"the path of the preference pairs is empty"),
    Case(
        "dataset: two prompts in every row",
        offline([{**row, "rejected": dialogue("Human: Other?", "Assistant: No.")} for row in DIALOGUES]),
        r"dropped: 6 prompts differ",
    ),
    Case(
        "dataset: two prompts in one row",
        evaluated([*DIALOGUES[:5], {**DIALOGUES[5], "rejected": dialogue("Human: Other?", "Assistant: No.")}]),
        r"model: ",
        goes_on=True,
    ),
    Case(
        "dataset: dialogues that end with a question",
        offline([{key: text + "\n\nHuman: And?" for key, text in row.items()} for row in DIALOGUES]),
        r"dropped: 6 prompts differ",
    ),
    Case(
        "dataset: dialogues that begin with an answer",
        offline([{"chosen": dialogue("Assistant: a"), "rejected": dialogue("Assistant: b")}] * 3),
        r"dropped: 3 empty|no question",
    ),
    Case(
        "dataset: chats with a role nobody knows",
        offline(
            [
                {
                    "prompt": [USER],
                    "chosen": [{"role": "bot", "content": "a"}],
                    "rejected": [{"role": "bot", "content": "b"}],
                }
            ]
            * 3
        ),
        r"dropped: 3",
    ),
    Case(
        "dataset: chats without roles",
        offline([{"prompt": [{"content": "a"}], "chosen": "b", "rejected": "c"}]),
        r"row 1: column 'prompt': every message needs a text `role` and a text `content`",
    ),
    Case(
        "dataset: chats in the hub's other form",
        offline([{"prompt": [{"from": "human", "value": "a"}], "chosen": "b", "rejected": "c"}]),
        r"every message needs a text `role`",
    ),
    Case(
        "dataset: chats whose content is a list of parts",
        offline(
            [{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "chosen": "b", "rejected": "c"}]
        ),
        r"every message needs a text `role` and a text `content`",
    ),
    Case(
        "dataset: chats that are empty",
        offline([{"prompt": [], "chosen": "b", "rejected": "c"}] * 3),
        r"dropped: 3 empty|row 1",
    ),
    Case(
        "dataset: chats whose prompt ends with an answer",
        offline([{"prompt": [USER, ASSISTANT], "chosen": "b", "rejected": "c"}] * 3),
        r"dropped: 3 no question",
    ),
    Case(
        "dataset: text and chats mixed",
        file(
            "pairs.jsonl",
            b"".join(
                json.dumps(row).encode() + b"\n"
                for row in (PAIRS[0], {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [USER]})
            ),
        ),
        r"pairs\.jsonl",
    ),
    Case("dataset: comparisons without a choice", offline([{**SUMMARY, "choice": None}]), r"dropped: 1 undecided"),
    Case(
        "dataset: comparisons of one summary",
        offline([{**SUMMARY, "summaries": [{"text": "a"}]}]),
        r"`info` and two `summaries` with a text each are needed",
    ),
    Case(
        "dataset: comparisons with a third choice",
        offline([{**SUMMARY, "choice": 2}]),
        r"choice must be 0 or 1, found 2",
    ),
    Case(
        "dataset: comparisons whose choice is a text",
        offline([{**SUMMARY, "choice": "first"}]),
        r"choice must be 0 or 1, found 'first'",
    ),
    Case(
        "dataset: comparisons whose post is a text",
        offline([{**SUMMARY, "info": "A post."}]),
        r"`info` and two `summaries`",
    ),
    Case("dataset: ids that are the same", offline(every(id="a")), r"6 rows", goes_on=True),
    Case(
        "dataset: prompts longer than prompts.max_tokens",
        offline(every(prompt="x" * 65)),
        r"no usable row \(dropped: 6 prompt too long\)",
    ),
    Case(
        "dataset: answers longer than the model takes",
        offline(every(chosen="x" * 200)),
        r"no usable row \(dropped: 6 too long\)",
    ),
    Case(
        "dataset: a field of a million characters",
        offline(changed(0, chosen=LONG)),
        r"5 rows, dropped: 1 too long",
        goes_on=True,
    ),
    Case(
        "dataset: answers that spell the end token",
        offline(every(chosen="Yes.</s> And more.")),
        r"no usable row \(dropped: 6 has end\)|6 rows",
    ),
    Case("dataset: half a character", offline(changed(0, chosen="\ud800")), r"pairs\.jsonl cannot be read"),
    Case(
        "dataset: NUL and half characters",
        offline(changed(0, chosen="\0\x1b[2J\u202e")),
        r"6 rows, dropped: none",
        goes_on=True,
    ),
    Case("dataset: all of its prompts are held out", offline(own_pairs(held_out=True)), r"held out"),
    Case(
        "dataset: none of its rows is of a training prompt",
        source(dataset="pairs.jsonl", match="prompts"),
        r"none of them for a training prompt: set match: rows",
    ),
    Case(
        "dataset: a match that is none",
        source(dataset="pairs.jsonl", match="row"),
        r"match: .*'auto', 'prompts' or 'rows'",
    ),
    Case(
        "dataset: a margin that no label reaches",
        arm(source={"dataset": "pairs.jsonl"}, pairing={"min_margin": 2}),
        r"pairing\.min_margin is 2, and a dataset's labels are 1 and 0",
    ),
    Case(
        "dataset: xpo_alpha, which needs answers of the reference",
        arm(source={"dataset": "pairs.jsonl"}, dpo={"xpo_alpha": 0.1}),
        r"xpo_alpha needs answers drawn from the reference",
    ),
    Case(
        "dataset: xpo_alpha beside spin",
        arm(source={"spin": "pairs.jsonl"}, dpo={"xpo_alpha": 0.1}),
        r"source: spin has others",
    ),
    Case(
        "xpo: a reference that the source leaves behind",
        arm(rounds=3, reference="initial", dpo={"xpo_alpha": 0.1}),
        r"arms\.offline: .*those of round 2 are another policy's: take source: current with reference: prior",
    ),
    Case(
        "xpo: a source some rounds late",
        arm(rounds=3, source={"lag": 1}, dpo={"xpo_alpha": 0.1}),
        r"those of round 2 are another policy's",
    ),
    Case(
        "xpo: source and reference that are refreshed together",
        arm(rounds=3, source={"every": 2}, reference={"every": 2}, dpo={"xpo_alpha": 0.1}),
        r"model: ",
        goes_on=True,
    ),
    Case(
        "dataset: importance weights of answers nobody sampled",
        arm(source={"dataset": "pairs.jsonl"}, dpo={"importance_clip": 2.0}),
        r"importance_clip",
    ),
    Case("dataset: rloo of answers nobody sampled", arm(source={"dataset": "pairs.jsonl"}, algorithm="rloo"), r"rloo"),
    Case(
        "dataset: order, which belongs to streams",
        source(dataset="pairs.jsonl", order="shuffled"),
        r"'order' belongs to stream, not to dataset",
    ),
    Case("dataset: two kinds of source at once", source(dataset="pairs.jsonl", every=2), r"exactly one of"),
    Case("dataset: the second arm's", two_arms, r"arm second: bad\.jsonl: no preference pairs"),
    Case("dataset: a part of a mixture", mixture(without("chosen")), r"arm mixed: pairs\.jsonl: no preference pairs"),
    Case(
        "dataset: spin on pairs without a chosen answer",
        spin_without_answers,
        r"no answers in columns prompt, rejected",
    ),
    Case(
        "ranking: pairs that all are trained on",
        evaluated(own_pairs(held_out=False)),
        r"evaluation\.pairs: pairs\.jsonl has no pair to measure by \(dropped: 7 trained on\)",
    ),
    Case(
        "ranking: pairs without an answer",
        evaluated(every(rejected="")),
        r"no usable preference pair \(dropped: 6 empty\)",
    ),
    Case(
        "ranking: pairs longer than the model takes",
        evaluated(every(chosen="x" * 300)),
        r"evaluation\.pairs: pairs\.jsonl has no pair to measure by \(dropped: 6 too long\)",
    ),
    Case("ranking: an unknown key", evaluated(PAIRS, seed=1), r"unknown key 'evaluation\.pairs\.seed'"),
    Case("sft: no answers", sft([{"prompt": "a"}]), r"sft: answers\.jsonl: no .*in columns prompt"),
    Case(
        "sft: empty answers",
        sft([{"prompt": "a", "answer": ""}] * 3),
        r"sft: answers\.jsonl: no usable answer \(dropped: 3 empty\)",
    ),
    Case("sft: no rejected answer where pairs are learnt", sft([{"prompt": "a", "answer": "b"}], on="both"), r"sft"),
    Case(
        "sft: no such file",
        lambda f: written(f, sft={"dataset": "nowhere.jsonl"}),
        r"sft: no (answers|preference pairs) at 'nowhere\.jsonl'",
    ),
    Case(
        "audit: no such pairs",
        audit_of_nothing,
        r"no preference pairs at 'pears\.jsonl' \(did you mean 'pairs\.jsonl'\?\)",
    ),
    Case("audit: pairs without columns", audit([{"a": 1}]), r"no preference pairs in columns a"),
    Case("audit: one pair", audit(PAIRS[:1]), r"judges\.length", goes_on=True),
    Case("audit: the output is a file", audit_into_a_file, r"cannot write to out"),
    Case(
        "real data: helpful-base",
        real("helpful-base.test.jsonl.gz"),
        r"dropped: 9 prompts differ, 4 empty, 2 identical",
        goes_on=True,
    ),
    Case(
        "real data: harmless-base",
        real("harmless-base.test.jsonl.gz"),
        r"harmless-base.test.jsonl.gz: \d+ rows",
        goes_on=True,
    ),
    Case(
        "real data: TL;DR posts longer than the model takes",
        real("tldr-batch13.jsonl"),
        r"tldr-batch13\.jsonl has 1 usable rows \(dropped: 59 too long\)",
    ),
    Case("real data: polite requests", real("politeness.json"), r"politeness.json: \d+ rows", goes_on=True),
)
