"""Prompts: read by `datasets`, tokenised once, split into training and held-out prompts, dealt to rounds.

Which prompt is held out, and which round gets which, follows from hashes of the prompts' ids: not from the order of
the file, the version of a random generator or, for the held-out set, the experiment's seed. Arms and seeds are
therefore measured on the same held-out prompts, and two arms of one seed train on the same prompts in each round.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.config import PromptsSpec
from online_dpo.errors import DataError, nearest, one_line
from online_dpo.line_faults import CUT_OFF, bad_json_line, opened, readable, refuse_other_encodings
from online_dpo.models import HUB_ID, HUB_TIMEOUT
from online_dpo.places import places_of
from online_dpo.types import Message, Prompt

READERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
SHOWN = 200
"""Characters of a path that a message repeats."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Disjoint training and held-out prompts, each in an order that follows from their ids alone.

    `dropped` counts what was left out: `empty`, `duplicate` (the same messages again), `too_long`; of a preference file
    also rows without a usable pair (`preferences.PreferenceSet.dropped`).
    `chat` tells whether the tokenizer's chat template was applied.
    """

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    dropped: dict[str, int]
    chat: bool


def load_prompts(spec: PromptsSpec, tokenizer: Any, *, folders: Sequence[Path] = ()) -> PromptSet:
    """Read, check, tokenise and split the prompts of `spec`.

    `tokenizer` is a Hugging Face tokenizer. `folders` are searched for a relative path before the current folder.
    Of a preference file without the column `prompts.column` the prompts of its pairs are taken.
    Raises `DataError`: no such file, column, split or dataset; a row that is not a prompt; too few prompts.
    """
    rows = read_rows(spec, [*folders, Path.cwd()])
    dropped = {"empty": 0, "duplicate": 0, "too_long": 0}
    chat = has_template(tokenizer)
    ids = _collect(spec, rows, dropped, turns=chat)
    prompts = []
    for messages, prompt_id in ids.items():
        token_ids = encode(messages, tokenizer, f"{spec.path}: prompt '{prompt_id}'")
        if len(token_ids) > spec.max_tokens:
            dropped["too_long"] += 1
        else:
            prompts.append(Prompt(prompt_id, messages, token_ids))
    train, held_out = split(prompts, spec.held_out)
    _check_enough(spec, prompts, train, dropped)
    return PromptSet(train, held_out, dropped, chat=chat)


def split(prompts: Sequence[Prompt], held_out: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """(training, held-out) prompts: the `held_out` prompts whose ids hash lowest are held out."""
    ranked = sorted(prompts, key=lambda prompt: _rank("held_out", prompt.id))
    return tuple(ranked[held_out:]), tuple(ranked[:held_out])


def prompts_for_round(train: Sequence[Prompt], seed: int, index: int, per_round: int) -> tuple[Prompt, ...]:
    """The `per_round` prompts of round `index` (1-based).

    A permutation seeded by `seed` is walked without replacement across rounds; when it is exhausted a new one begins.
    No prompt comes twice within a round. The order of `train` does not matter.
    Raises `DataError` when there are fewer training prompts than `per_round`.
    """
    if index < 1:
        raise ValueError(f"rounds are counted from 1, got {index}")
    if per_round > len(train):
        raise DataError(f"prompts.per_round is {per_round} but there are {len(train)} training prompts")
    start, stop = (index - 1) * per_round, index * per_round
    dealt: list[Prompt] = []
    cycle = 0
    while len(dealt) < stop:
        order = sorted(train, key=lambda prompt: _rank(f"{seed}:{cycle}", prompt.id))
        # A round that began in the last permutation must not meet the same prompts in this one: they come last.
        begun = {prompt.id for prompt in dealt[len(dealt) - len(dealt) % per_round :]}
        dealt += sorted(order, key=lambda prompt: prompt.id in begun)
        cycle += 1
    return tuple(dealt[start:stop])


def encode(messages: Sequence[Message], tokenizer: Any, where: str = "prompt") -> tuple[int, ...]:
    """Token ids that an answer follows: the chat template with its generation prompt, or plain text.

    Plain text (no chat template) gets the begin token that the tokenizer adds, once, and no end token.
    Raises `DataError`, beginning with `where`, when the messages do not fit the tokenizer.
    """
    if has_template(tokenizer):
        token_ids = _encode_chat(messages, tokenizer, where)
        if not token_ids:
            raise DataError(f"{where}: the model's chat template writes nothing for it, so there is nothing to answer")
        return token_ids
    if len(messages) != 1 or messages[0].role != "user":
        raise DataError(
            f"{where}: the model's tokenizer has no chat template, so a prompt is one plain text: "
            "take a chat model, set prompts.template: dialogue, or give a column of plain text without `prompts.system`"
        )
    return plain_ids(messages[0].content, tokenizer)


def plain_ids(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of plain text that goes on: the begin token that the tokenizer adds, once, and no end token."""
    token_ids = [int(token) for token in tokenizer(text)["input_ids"]]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and token_ids[:2] == [bos, bos]:
        token_ids = token_ids[1:]  # the text itself began with the begin token's text
    if eos is not None and eos != bos and token_ids[-1:] == [eos]:
        token_ids = token_ids[:-1]  # some tokenizers close every text; nothing would follow
    return tuple(token_ids)


# --- tokenising ---


def has_template(tokenizer: Any) -> bool:
    """Whether prompts are written by a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def _encode_chat(messages: Sequence[Message], tokenizer: Any, where: str) -> tuple[int, ...]:
    from jinja2 import TemplateError

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        # The template writes the begin token itself; apply_chat_template adds no other.
        token_ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise DataError(f"{where}: the model's chat template refuses it: {one_line(error)}") from error
    return tuple(int(token) for token in token_ids)


# --- rows ---


def _collect(spec: PromptsSpec, rows: Any, dropped: dict[str, int], *, turns: bool) -> dict[tuple[Message, ...], str]:
    """The distinct prompts of `rows` and their ids; counts into `dropped` what it leaves out.

    `turns`: a text of "Human:" and "Assistant:" turns is read as such (a chat template writes it anew).
    """
    given = _given_ids(spec, rows)
    ids: dict[tuple[Message, ...], str] = {}
    for number, (own, plain) in enumerate(_rows_messages(spec, rows, dropped, turns=turns)):
        if own is None:
            continue  # a row without a usable pair, counted
        if not own or not own[-1].content.strip():
            dropped["empty"] += 1
            continue
        prompt_id = given[number] if given is not None else message_id(own)
        messages = with_system(own, spec.system) if plain else own
        if messages in ids:
            dropped["duplicate"] += 1
            # The smallest id stays, so that the order of the rows does not matter.
            prompt_id = min(prompt_id, ids[messages])
        ids[messages] = prompt_id
    twice = [prompt_id for prompt_id, count in Counter(ids.values()).items() if count > 1]
    if twice:
        raise DataError(f"{spec.path}: two different prompts have the id '{min(twice)}' ({len(twice)} such ids)")
    return ids


def _rows_messages(
    spec: PromptsSpec, rows: Any, dropped: dict[str, int], *, turns: bool
) -> Iterator[tuple[tuple[Message, ...] | None, bool]]:
    """Each row's messages, and whether they are one plain text; None for a row of a preference file without a pair."""
    from online_dpo.preferences import is_preference_form, parse_pairs, prompt_turns

    if spec.column not in rows.column_names and is_preference_form(rows.column_names):
        lost: Counter[str] = Counter()
        for pair in parse_pairs(rows, spec.path, lost):
            yield (None if pair is None else pair.messages), pair is not None and len(pair.messages) == 1
        dropped |= lost
        return
    column = _column(spec, rows.column_names)
    for number, value in enumerate(rows[column], start=1):
        where = f"{spec.path}: row {number}: column '{column}'"
        said = prompt_turns(value) if turns and isinstance(value, str) else ()
        if said:
            yield _in_order(said, where), len(said) == 1
        else:
            yield _messages(value, where), isinstance(value, str)


def with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """`messages` behind the experiment's system message (`prompts.system`), where there is one."""
    return messages if system is None else (Message("system", system), *messages)


def _given_ids(spec: PromptsSpec, rows: Any) -> list[str] | None:
    """`id_column` as text, one a row; None when the experiment names no such column."""
    if spec.id_column is None:
        return None
    if spec.id_column not in rows.column_names:
        raise DataError(_no_column("id_column", spec.id_column, spec.path, rows.column_names))
    values = list(rows[spec.id_column])
    for number, value in enumerate(values, start=1):
        if value is None or not str(value).strip():
            raise DataError(f"{spec.path}: row {number}: column '{spec.id_column}' (prompts.id_column) is empty")
    return [str(value) for value in values]


def _column(spec: PromptsSpec, columns: Sequence[str]) -> str:
    if spec.column in columns:
        return spec.column
    if list(columns) == ["text"]:
        return "text"  # what a text file's lines are called
    raise DataError(_no_column("column", spec.column, spec.path, columns))


def _no_column(key: str, name: str, path: str, columns: Sequence[str]) -> str:
    return f"{path}: prompts.{key}: no column '{name}'{nearest(name, columns)}; columns: {', '.join(columns)}"


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    """The messages of one row; empty for a null, an empty list or an empty text."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (Message("user", value),)
    if not isinstance(value, list):
        raise DataError(f"{where}: text or a list of {{role, content}} is needed, found {type(value).__name__}")
    return _in_order(tuple(to_message(turn, where) for turn in value), where)


def _in_order(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    if messages and messages[-1].role == "assistant":
        raise DataError(
            f"{where}: ends with an assistant turn: a prompt ends with the user's turn, the policy answers it "
            "(name the column that holds the prompt alone, or cut the answer off)"
        )
    if messages and {message.role for message in messages} == {"system"}:
        raise DataError(f"{where}: has a system message but no user's turn")
    late = next((number for number, message in enumerate(messages, 1) if number > 1 and message.role == "system"), None)
    if late is not None:
        raise DataError(f"{where}: message {late} is a system message: one stands first, before the user's turn")
    first = next((message.role for message in messages if message.role != "system"), None)
    if first == "assistant":
        raise DataError(f"{where}: begins with an assistant turn: a prompt begins with the user's")
    return messages


def to_message(turn: Any, where: str) -> Message:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{where}: every message needs a text `role` and a text `content`, found {turn!r:.80}")
    return Message(role, content)


def message_id(messages: Sequence[Message]) -> str:
    """16 hexadecimal digits of the SHA-256 of the row's own messages (without `prompts.system`)."""
    canonical = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _check_enough(
    spec: PromptsSpec, prompts: Sequence[Prompt], train: Sequence[Prompt], dropped: Mapping[str, int]
) -> None:
    lost = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count)
    there = f"{spec.path} has {len(prompts)} usable prompts" + (f" (dropped: {lost})" if lost else "")
    if not train:
        raise DataError(f"{there}, but prompts.held_out is {spec.held_out}: at least {spec.held_out + 1} are needed")
    if spec.per_round > len(train):
        raise DataError(
            f"{there}, {len(train)} of them for training after held_out {spec.held_out}, "
            f"but prompts.per_round is {spec.per_round}"
        )


def _rank(salt: str, prompt_id: str) -> tuple[bytes, str]:
    """A sort key that is random in `salt` and the id, and the same on every machine."""
    return hashlib.sha256(f"{salt}\0{prompt_id}".encode("utf-8", "surrogatepass")).digest(), prompt_id


# --- reading ---


def read_rows(spec: PromptsSpec, bases: Sequence[Path], what: str = "prompts") -> Any:
    """The `datasets.Dataset` of `spec`: a file, a folder, or a hub dataset. A relative path is searched in `bases`.

    `what` is what the message calls it when there is none. Raises `DataError`.
    """
    if not spec.path.strip():
        raise DataError(f"the path of the {what} is empty")
    found = next(iter(places_of(spec.path, bases)), None)
    if found is None and not _looks_like_hub_id(spec.path, bases):
        raise DataError(f"no {what} at '{spec.path:.{SHOWN}}'{_nearest_file(Path(spec.path), bases)}")
    import datasets  # after the cheap errors: it takes a second

    try:
        with _quiet():
            if found is None:
                return _read_hub(spec, bases)
            return _read_file(spec, found) if found.is_file() else _read_folder(spec, found)
    # StopIteration is what `datasets` lets through for a file without rows.
    except (*CUT_OFF, ValueError, TypeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{spec.path}: split '{spec.split}' has no rows") from error
        line = bad_json_line(found) if found is not None and _suffix(found) in JSON_LINES else ""
        raise DataError(f"{spec.path} cannot be read: {line or one_line(error.__cause__ or error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """`datasets` without its bars, and without its own line about a file that it cannot read."""
    import datasets

    level, shown = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _read_file(spec: PromptsSpec, path: Path) -> Any:
    import datasets

    suffix = _suffix(path)
    if suffix not in READERS:
        raise DataError(f"{spec.path}: a prompt file is one of {', '.join(READERS)}{nearest(suffix, READERS)}")
    if "::" in str(path):
        raise DataError(f"{spec.path}: '::' in a path is taken for a chain of addresses: give it another name")
    if path.stat().st_size == 0:
        raise DataError(f"{spec.path} is empty")
    if not readable(path):
        _refuse_without_zstd(spec)
    elif READERS[suffix] != "parquet":
        refuse_other_encodings(path, spec.path)
    options = _csv_options(spec.path, path, suffix) if READERS[suffix] == "csv" else {}
    # Escaped: a star in the name would stand for other files too.
    return datasets.load_dataset(READERS[suffix], data_files=glob.escape(str(path)), split=spec.split, **options)


def _refuse_without_zstd(spec: PromptsSpec) -> None:
    from fsspec.compression import available_compressions

    if "zstd" not in available_compressions():
        raise DataError(f"{spec.path}: .zst needs the package zstandard: install it, or compress the file with gzip")


def _suffix(path: Path) -> str:
    """What the file's name ends with, but for compression."""
    return next((suffix for suffix in reversed(path.suffixes) if suffix not in COMPRESSED), "")


def _csv_options(name: str, path: Path, suffix: str) -> dict[str, Any]:
    """Every cell is text: neither an id 007 nor a prompt "None" may turn into something else."""
    import datasets

    separator = "\t" if suffix == ".tsv" else ","
    options: dict[str, Any] = {"sep": separator, "keep_default_na": False}
    if not readable(path):
        return options
    with opened(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        header = next(csv.reader(text, delimiter=separator), [])
    twice = next((column for column in header if header.count(column) > 1), None)
    if twice is not None:
        raise DataError(f"{name}: two columns are called '{twice}': rename one")
    options["features"] = datasets.Features({column: datasets.Value("string") for column in header})
    return options


def _read_folder(spec: PromptsSpec, path: Path) -> Any:
    import datasets

    if (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(path))
        if spec.split not in splits:
            raise DataError(
                f"{spec.path}: no split '{spec.split}'{nearest(spec.split, splits)}; splits: {', '.join(splits)}"
            )
        return splits[spec.split]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path), name=spec.name, split=spec.split)


def _read_hub(spec: PromptsSpec, bases: Sequence[Path]) -> Any:
    import datasets
    import huggingface_hub

    advice = (
        "give a file or folder instead (download it on another machine), set HF_ENDPOINT to a mirror, "
        "or set HF_HUB_OFFLINE=1 when the hub's cache here has it"
    )
    missing = _nearest_file(Path(spec.path), bases)
    if not huggingface_hub.is_offline_mode():
        try:
            # Asked first and with a limit: `datasets` itself retries for half a minute.
            huggingface_hub.HfApi().dataset_info(spec.path, timeout=HUB_TIMEOUT)
        except Exception as error:  # the hub's client raises its HTTP library's errors, which differ between versions
            raise DataError(f"no hub dataset '{spec.path}'{missing} ({one_line(error)}): {advice}") from error
    try:
        return datasets.load_dataset(spec.path, name=spec.name, split=spec.split)
    except ConnectionError as error:
        raise DataError(f"no hub dataset '{spec.path}'{missing} ({one_line(error)}): {advice}") from error


def _looks_like_hub_id(name: str, bases: Sequence[Path]) -> bool:
    """`org/name` that is not a path into a folder that exists here, nor a data file's name."""
    if not HUB_ID.fullmatch(name) or any(suffix in READERS for suffix in Path(name).suffixes):
        return False
    return not any((base / name).parent.is_dir() for base in bases)


def _nearest_file(path: Path, bases: Sequence[Path]) -> str:
    """`` (did you mean ...?)`` for the nearest name in the folder that should hold `path`; empty when none is near."""
    for base in bases:
        parent = (base / path).parent
        if parent.is_dir():
            close = nearest(path.name, sorted(os.listdir(parent)))
            if close:
                return close
    return ""
