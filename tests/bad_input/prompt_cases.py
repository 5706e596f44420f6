"""Prompt files that are not there, not read, or hold what is no prompt."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from case import Case
from tiny_models import CHAT, copy, edit_json, llama

from experiments import experiment

Arrange = Callable[[Path], list[str]]
GOOD = [f"Tell me of number {i}." for i in range(9)]


def given(name: str, content: bytes | str, **keys: Any) -> Arrange:
    """`check` of an experiment whose prompts are in a file of this name and content."""

    def arrange(folder: Path) -> list[str]:
        return checked(folder, name, content if isinstance(content, bytes) else content.encode(), **keys)

    return arrange


def checked(folder: Path, name: str, content: bytes, chat: bool = False, **keys: Any) -> list[str]:
    """With `chat` the model's tokenizer has a template of roles."""
    spec = experiment(folder)
    (folder / "prompts.jsonl").unlink(missing_ok=True)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    if chat:
        edit_json(copy(llama, folder / "model") / "tokenizer_config.json", chat_template=CHAT)
        spec["model"] = "model"
    spec["prompts"] = {"path": name, "per_round": 2, "held_out": 2, "max_tokens": 64, **keys}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(spec, allow_unicode=True), encoding="utf-8")
    return ["check", "experiment.yaml"]


def rows(*values: Any, column: str = "prompt") -> str:
    """JSON lines."""
    return "".join(json.dumps({column: value}) + "\n" for value in values)


def texts(*more: Any, **keys: Any) -> Arrange:
    """Nine right prompts and more."""
    return given("prompts.jsonl", rows(*GOOD, *more), **keys)


def chats(*more: Sequence[tuple[str, Any]], **keys: Any) -> Arrange:
    """Nine right chats and more, each a list of (role, content)."""
    right = [[("user", text)] for text in GOOD]
    written = [[{"role": role, "content": content} for role, content in turns] for turns in (*right, *more)]
    return given("prompts.jsonl", rows(*written), chat=True, **keys)


def broken(line: str, number: int = 4) -> str:
    """Nine right lines with another one among them."""
    lines = rows(*GOOD).splitlines()
    return "\n".join([*lines[:number], line, *lines[number:]]) + "\n"


def parquet(folder: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": [1, 2, 3, 4, 5, 6, 7]}), folder / "p.parquet")
    return checked(folder, "p.parquet", (folder / "p.parquet").read_bytes())


def a_folder(folder: Path) -> list[str]:
    arguments = checked(folder, "prompts", b"x")
    (folder / "prompts").unlink()
    (folder / "prompts").mkdir()
    return arguments


def a_link_to_nothing(folder: Path) -> list[str]:
    arguments = checked(folder, "prompts.jsonl", b"x")
    (folder / "prompts.jsonl").unlink()
    (folder / "prompts.jsonl").symlink_to("nowhere.jsonl")
    return arguments


def a_name_in_bytes(folder: Path) -> list[str]:
    """A file name that is no text; YAML cannot name it but by its escape."""
    arguments = checked(folder, "prompts.jsonl", rows(*GOOD).encode())
    os.rename(os.fsencode(folder / "prompts.jsonl"), os.fsencode(folder) + b"/pr\xffmpts.jsonl")
    return arguments


def seven(reply: str) -> str:
    return "".join(f"{GOOD[i]}\n" for i in range(7)) + reply


def star_beside(folder: Path) -> list[str]:
    """A name that a library would take for a pattern, beside a file that fits it."""
    (folder / "proXmpts.jsonl").write_text(rows("Another file's."), encoding="utf-8")
    return checked(folder, "pro*mpts.jsonl", rows(*GOOD).encode())


def trained_and_held_out(folder: Path) -> list[str]:
    """SFT on pairs of the very prompts: those that are held out are among them."""
    return with_pairs(folder, GOOD)


def all_trained_on(folder: Path) -> list[str]:
    """Pairs to measure by, of training prompts alone."""
    from conftest import byte_tokenizer

    from online_dpo.config import PromptsSpec
    from online_dpo.prompts import load_prompts

    checked(folder, "prompts.jsonl", rows(*GOOD).encode())
    spec = PromptsSpec(path="prompts.jsonl", per_round=2, held_out=2)
    train = load_prompts(spec, byte_tokenizer(), folders=[folder]).train
    return with_pairs(folder, [prompt.text for prompt in train])


def with_pairs(folder: Path, asked: Sequence[str]) -> list[str]:
    """`check` of an experiment that trains on pairs of these prompts, and measures by them."""
    arguments = checked(folder, "prompts.jsonl", rows(*GOOD).encode())
    pairs = [{"prompt": text, "chosen": "Yes.", "rejected": "No, never."} for text in asked]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    spec = yaml.safe_load((folder / "experiment.yaml").read_text(encoding="utf-8"))
    spec |= {"sft": {"dataset": "pairs.jsonl"}, "evaluation": {"pairs": "pairs.jsonl"}}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    return arguments


FILES: tuple[tuple[str, Arrange, str], ...] = (
    ("an empty file", given("prompts.jsonl", ""), r"prompts\.jsonl is empty"),
    ("line ends alone", given("prompts.jsonl", "\n\n\n"), r"prompts\.jsonl"),
    ("an empty text file", given("prompts.txt", ""), r"prompts\.txt is empty"),
    ("an empty list", given("prompts.json", "[]"), r"prompts\.json"),
    ("a CSV's header alone", given("prompts.csv", "prompt,id\n"), r"prompts\.csv.*(0 usable prompts|no rows|empty)"),
    ("an empty folder", a_folder, r"prompts"),
    ("a link to nothing", a_link_to_nothing, r"no prompts at 'prompts\.jsonl'"),
    ("a file name that is no text", a_name_in_bytes, r"no prompts at 'prompts\.jsonl'"),
    ("no path", given("prompts.jsonl", rows(*GOOD), path=""), r"the path of the prompts is empty"),
    (
        "a path with a null character",
        given("prompts.jsonl", rows(*GOOD), path="a\0b.jsonl"),
        r"no prompts at 'ab\.jsonl'",
    ),
    (
        "a path longer than file systems take",
        given("p.jsonl", rows(*GOOD), path="x" * 5000 + ".jsonl"),
        r"no prompts at 'x+",
    ),
    (
        "a home folder of nobody",
        given("p.jsonl", rows(*GOOD), path="~nobody-of-this-name/p.jsonl"),
        r"no prompts at '~nobody",
    ),
    (
        "a misspelt path",
        given("prompts.jsonl", rows(*GOOD), path="promtps.jsonl"),
        r"no prompts at 'promtps\.jsonl' \(did you mean 'prompts\.jsonl'\?\)",
    ),
    ("no known ending", given("prompts.docx", "x"), r"prompts\.docx: a prompt file is one of \.jsonl"),
    (
        "a misspelt ending",
        given("prompts.jsnl", rows(*GOOD)),
        r"prompts\.jsnl: a prompt file is one of .*did you mean '\.jsonl'",
    ),
    (
        "a hub dataset without the hub",
        given("p.jsonl", rows(*GOOD), path="some-org/some-prompts"),
        r"no hub dataset 'some-org/some-prompts'",
    ),
    ("no such split", given("prompts.jsonl", rows(*GOOD), split="tset"), r"prompts\.jsonl.*split.*'?tset'?"),
    (
        "another column",
        given("prompts.jsonl", rows(*GOOD, column="promt")),
        r"prompts\.column: no column 'prompt' \(did you mean 'promt'\?\); columns: promt",
    ),
    ("a misspelt column", texts(column="pormpt"), r"no column 'pormpt' \(did you mean 'prompt'\?\)"),
    ("no column of ids", texts(id_column="idd"), r"prompts\.id_column: no column 'idd'"),
    (
        "an id twice",
        given("prompts.jsonl", "".join(json.dumps({"prompt": t, "id": "a"}) + "\n" for t in GOOD), id_column="id"),
        r"two different prompts have the id 'a'",
    ),
    (
        "an empty id",
        given("prompts.jsonl", "".join(json.dumps({"prompt": t, "id": ""}) + "\n" for t in GOOD), id_column="id"),
        r"row 1: column 'id' \(prompts\.id_column\) is empty",
    ),
    (
        "a broken line in the middle",
        given("prompts.jsonl", broken('{"prompt": "half a')),
        r"line 5 is no JSON \(Unterminated string",
    ),
    ("a line that is no JSON", given("prompts.jsonl", broken("just words")), r"prompts\.jsonl.*line 5"),
    ("a list among the lines", given("prompts.jsonl", broken('["a", "b"]')), r"prompts\.jsonl.*line 5"),
    ("a text among the lines", given("prompts.jsonl", broken('"words"')), r"prompts\.jsonl.*line 5"),
    ("a truncated last line", given("prompts.jsonl", rows(*GOOD)[:-8]), r"prompts\.jsonl.*line 9"),
    (
        "bytes that are no text",
        given("prompts.jsonl", broken('{"prompt": "caf\\xe9"}').encode().replace(b"\\xe9", b"\xe9")),
        r"prompts\.jsonl.*UTF-8.*line 5",
    ),
    ("Latin-1 as text", given("prompts.txt", seven("café\n").encode("latin-1")), r"prompts\.txt.*UTF-8.*line 8"),
    (
        "Latin-1 as CSV",
        given("prompts.csv", ("prompt\n" + seven("café\n")).encode("latin-1")),
        r"prompts\.csv.*UTF-8.*line 9",
    ),
    ("UTF-16", given("prompts.jsonl", rows(*GOOD).encode("utf-16")), r"prompts\.jsonl.*UTF-8.*line 1"),
    (
        "half a surrogate pair",
        given("prompts.jsonl", broken('{"prompt": "\\ud83d and more"}')),
        r"prompts\.jsonl.*line 5 has half of a surrogate pair",
    ),
    (
        "a number of five thousand digits",
        given("prompts.jsonl", broken('{"prompt": 1' + "0" * 5000 + "}")),
        r"prompts\.jsonl.*(line 5|row 5)",
    ),
    ("two colons in the file's name", given("a::b.jsonl", rows(*GOOD)), r"a::b\.jsonl: '::' in a path"),
    (
        "an xz archive cut off",
        given("prompts.jsonl.xz", lzma.compress(rows(*GOOD).encode())[:-20]),
        r"prompts\.jsonl\.xz",
    ),
    ("noise", given("prompts.jsonl", bytes(range(256)) * 40), r"prompts\.jsonl"),
    (
        "a bzip2 archive that is none",
        given("prompts.jsonl.bz2", rows(*GOOD)),
        r"prompts\.jsonl\.bz2 cannot be read",
    ),
    ("a zstd archive that is none", given("prompts.jsonl.zst", rows(*GOOD)), r"prompts\.jsonl\.zst"),
    ("noise as Parquet", given("prompts.parquet", bytes(range(256)) * 40), r"prompts\.parquet.*"),
    ("a truncated Parquet file", given("prompts.parquet", b"PAR1" + bytes(100)), r"prompts\.parquet"),
    ("numbers in Parquet", parquet, r"row 1: column 'prompt': text or a list"),
    (
        "a truncated archive",
        given("prompts.jsonl.gz", gzip.compress(rows(*GOOD).encode())[:-20]),
        r"prompts\.jsonl\.gz",
    ),
    ("an archive that is none", given("prompts.jsonl.gz", rows(*GOOD)), r"prompts\.jsonl\.gz"),
    ("CSV of an unclosed quote", given("prompts.csv", 'prompt\n"unclosed\n' + seven("")), r"prompts\.csv"),
    (
        "CSV with a row of more columns",
        given("prompts.csv", "prompt\n" + seven("a,b,c\n")),
        r"prompts\.csv.*(line|row) 9",
    ),
    (
        "CSV with the same column twice",
        given("prompts.csv", "prompt,prompt\na,b\n"),
        r"prompts\.csv: two columns are called 'prompt'",
    ),
    ("a JSON file of one text", given("prompts.json", '"words"'), r"prompts\.json"),
    (
        "JSON a thousand deep",
        given("prompts.jsonl", broken('{"prompt": ' + "[" * 3000 + "]" * 3000 + "}")),
        r"prompts\.jsonl",
    ),
)
"""What the file is."""

ROWS: tuple[tuple[str, Arrange, str], ...] = (
    (
        "one prompt",
        given("prompts.jsonl", rows("Hi.")),
        r"prompts\.jsonl has 1 usable prompts, but prompts\.held_out is 2: at least 3 are needed",
    ),
    ("nothing but empty texts", given("prompts.jsonl", rows("", "  ", "\n")), r"0 usable prompts \(dropped: 3 empty\)"),
    ("nothing but nulls", given("prompts.jsonl", rows(None, None)), r"0 usable prompts \(dropped: 2 empty\)"),
    (
        "nothing but one prompt again and again",
        given("prompts.jsonl", rows(*["Hi."] * 9)),
        r"1 usable prompts \(dropped: 8 duplicate\)",
    ),
    (
        "nothing but prompts that are too long",
        given("prompts.jsonl", rows(*[f"{i} " + "x" * 100 for i in range(9)])),
        r"0 usable prompts \(dropped: 9 too long\)",
    ),
    (
        "prompts longer than the context",
        given("prompts.jsonl", rows(*[f"{i} " + "x" * 200 for i in range(9)]), max_tokens=500),
        r"takes 128 tokens.*prompts\.max_tokens",
    ),
    (
        "a prompt and no room for its answer",
        given("prompts.jsonl", rows(*[f"{i} " + "x" * 120 for i in range(9)]), max_tokens=500),
        r"takes 128 tokens",
    ),
    ("as many held out as there are", texts(held_out=9), r"9 usable prompts, but prompts\.held_out is 9: at least 10"),
    ("more a round than there are", texts(per_round=8), r"but prompts\.per_round is 8"),
    (
        "numbers",
        given("prompts.jsonl", rows(*range(9))),
        r"row 1: column 'prompt': text or a list of \{role, content\} is needed, found int",
    ),
    ("truth values", given("prompts.jsonl", rows(*[True] * 9)), r"row 1: column 'prompt': text or a list"),
    ("mappings", given("prompts.jsonl", rows(*[{"text": t} for t in GOOD])), r"row 1: column 'prompt': text or a list"),
    (
        "lists of texts",
        given("prompts.jsonl", rows(*[[t] for t in GOOD])),
        r"row 1: column 'prompt': every message needs",
    ),
    (
        "a chat for a model of plain text",
        given(
            "prompts.jsonl",
            rows(
                *[
                    [
                        {"role": "user", "content": t},
                        {"role": "assistant", "content": "Yes."},
                        {"role": "user", "content": "Why?"},
                    ]
                    for t in GOOD
                ]
            ),
        ),
        r"no chat template.*prompts\.template: dialogue",
    ),
    ("a system message for a model of plain text", texts(system="Be kind."), r"no chat template.*prompts\.system"),
    (
        "a chat that ends with the assistant",
        chats([("user", "Hi"), ("assistant", "Hello")]),
        r"row 10: column 'prompt': ends with an assistant turn",
    ),
    (
        "a chat that begins with the assistant",
        chats([("assistant", "Hello"), ("user", "Hi")]),
        r"row 10.*begins with an assistant",
    ),
    ("a system message at the end", chats([("user", "Hi"), ("system", "Be kind.")]), r"row 10.*system message"),
    (
        "a system message in the middle",
        chats([("user", "Hi"), ("system", "Be kind."), ("user", "Why?")]),
        r"row 10.*system message",
    ),
    ("a system message alone", chats([("system", "Be kind.")]), r"row 10.*has a system message but no user's turn"),
    ("a role that is none", chats([("usr", "Hi")]), r"no such role: usr|role 'usr'"),
    (
        "a message without a role",
        given("prompts.jsonl", rows(*[[{"content": t}] for t in GOOD]), chat=True),
        r"row 1.*text `role` and a text `content`",
    ),
    ("a message whose content is a list", chats([("user", ["Hi"])]), r"row 10|cannot be read"),
    ("a message without content", chats([("user", None)]), r"row 10: column 'prompt': every message needs"),
)
"""What its rows are."""

WIDE = "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u202eabc\u202c"
ODD: tuple[tuple[str, Arrange, str], ...] = (
    ("text from right to left", texts(WIDE), r"prompts: 8 to train"),
    (
        "emoji, combining and unassigned characters",
        texts("\U0001f469\u200d\U0001f52c e\u0301\u0301 \U000e0fff"),
        r"prompts: 8 to train",
    ),
    ("a null character inside", texts("a\0b"), r"prompts: 8 to train"),
    ("control sequences", texts("\x1b[2J\x1b]0;title\x07"), r"prompts: 8 to train"),
    ("special tokens' texts", texts("<s></s><pad>"), r"prompts: 8 to train"),
    ("a template's text", texts("{{ 7 * 7 }} {% raw %}"), r"prompts: 8 to train"),
    ("some empty", texts("", None, "  "), r"'empty': 3"),
    ("some twice", texts(GOOD[0], GOOD[0]), r"'duplicate': 2"),
    ("one of ten megabytes", texts("x" * 10_000_000), r"'too_long': 1"),
    ("a byte order mark", given("prompts.jsonl", b"\xef\xbb\xbf" + rows(*GOOD).encode()), r"prompts: 7 to train"),
    (
        "a byte order mark before CSV",
        given("p.csv", b"\xef\xbb\xbf" + ("prompt\n" + seven("")).encode()),
        r"prompts: 5 to train",
    ),
    ("Windows' line ends", given("prompts.jsonl", rows(*GOOD).replace("\n", "\r\n")), r"prompts: 7 to train"),
    ("Windows' line ends in a text file", given("p.txt", seven("").replace("\n", "\r\n")), r"prompts: 5 to train"),
    ("no line end at the end", given("prompts.jsonl", rows(*GOOD).rstrip()), r"prompts: 7 to train"),
    ("empty lines", given("prompts.jsonl", rows(*GOOD).replace("\n", "\n\n")), r"prompts: 7 to train"),
    ("brackets in the file's name", given("prompts[1].jsonl", rows(*GOOD)), r"prompts: 7 to train"),
    ("a star in the file's name", given("pro*mpts.jsonl", rows(*GOOD)), r"prompts: 7 to train"),
    ("a question mark in the file's name", given("prompts?.jsonl", rows(*GOOD)), r"prompts: 7 to train"),
    ("braces in the folder's name", given("a{b,c}/prompts.csv", "prompt\n" + seven("")), r"prompts: 5 to train"),
    ("an at sign and a hash in the file's name", given("a@b#c.jsonl", rows(*GOOD)), r"prompts: 7 to train"),
    (
        "a space and quotes in the file's name",
        given("my 'best' \"prompts\".jsonl", rows(*GOOD)),
        r"prompts: 7 to train",
    ),
    ("a file's name of another alphabet", given("промпты.jsonl", rows(*GOOD)), r"prompts: 7 to train"),
    (
        "a text and a chat among each other",
        given("prompts.jsonl", rows(*GOOD, [{"role": "user", "content": "Hi"}])),
        r"prompts: 8 to train",
    ),
    (
        "two objects on a line",
        given("prompts.jsonl", broken('{"prompt": "a"} {"prompt": "b"}')),
        r"prompts: 9 to train",
    ),
    ("brackets in the folder's name", given("a[1]/prompts.jsonl", rows(*GOOD)), r"prompts: 7 to train"),
    ("a star in the name, and another file that it fits", star_beside, r"prompts: 7 to train"),
    (
        "compressed CSV",
        given("p.csv.gz", gzip.compress(("prompt\n" + seven("007\n")).encode())),
        r"prompts: 6 to train",
    ),
    ("held-out prompts among those that SFT trains on", trained_and_held_out, r"7 rows, dropped: 2 held out"),
    (
        "a chat in the right order",
        chats([("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]),
        r"prompts: \d to train",
    ),
)
"""What is odd, and right."""

CASES: tuple[Case, ...] = (
    *(Case(f"prompts: {name}", arrange, says, exit_code=2) for name, arrange, says in (*FILES, *ROWS)),
    Case(
        "prompts: no held-out pair that was not trained on",
        all_trained_on,
        r"evaluation\.pairs: pairs\.jsonl has no pair to measure by \(dropped: 7 trained on\)",
        exit_code=2,
    ),
    *(Case(f"prompts: {name}", arrange, says, goes_on=True) for name, arrange, says in ODD),
)
