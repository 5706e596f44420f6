"""Models and datasets are data: no pickle is read, no script of theirs runs, and text is never a template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer

from online_dpo.config import PromptsSpec
from online_dpo.errors import DataError, ModelError
from online_dpo.models import load_tokenizer, resolve_model
from online_dpo.prompts import load_prompts, read_rows
from online_dpo.types import Message

TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant] "
TEXT = "{{ 7 * 7 }} {% raw %} {# note #} {{ messages[0].role }} {{ ''.__class__ }}"
EVIL = """
import os, pathlib
pathlib.Path({marker!r}).write_text("ran")
import datasets
class Builder(datasets.GeneratorBasedBuilder):
    def _info(self): return datasets.DatasetInfo()
"""


# --- weights ---


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    """A good folder of a model."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_a_folder_of_pickles_alone_is_refused(model: Path, name: str) -> None:
    for file in model.glob("*.safetensors"):
        file.rename(model / name)
    with pytest.raises(ModelError, match=r"only pickled weights.*unpickling runs code"):
        resolve_model(str(model))


def test_a_folder_of_a_pickled_adapter_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="is a LoRA adapter"):
        resolve_model(str(folder))


def test_a_pickle_beside_safetensors_is_not_opened(model: Path) -> None:
    """Reading it would run what it says; here it would write a file."""
    import pickle

    from online_dpo.backends.hf_model import load_causal_lm

    marker = model / "ran"

    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    import torch

    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    load_causal_lm(resolve_model(str(model)).path, torch.float32)
    assert not marker.exists()
    with pytest.raises(TypeError):  # so it would have run
        pickle.loads(pickle.dumps(Runs()))["x"]  # noqa: S301
    assert marker.exists()


def test_a_models_own_code_does_not_run(model: Path) -> None:
    """Its configuration names classes of files beside it, as models with remote code do."""
    from online_dpo.backends.hf_model import load_causal_lm

    marker = model / "ran"
    (model / "modeling_evil.py").write_text(EVIL.format(marker=str(marker)), encoding="utf-8")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "modeling_evil.Builder", "AutoModelForCausalLM": "modeling_evil.Builder"},
    }
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    import torch

    with pytest.raises(ModelError, match="cannot load a causal language model"):
        load_causal_lm(resolve_model(str(model)).path, torch.float32)
    assert not marker.exists()


# --- templates ---


def tokenizer(template: str | None) -> Any:
    found = byte_tokenizer()
    found.chat_template = template
    return found


def prompts_file(folder: Path, *texts: Any) -> PromptsSpec:
    rows = [json.dumps({"prompt": text}) for text in (*texts, "one", "two")]
    (folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return PromptsSpec(path=str(folder / "prompts.jsonl"), per_round=1, held_out=1, system=TEXT)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_text_of_a_dataset_is_no_template(tmp_path: Path, template: str | None) -> None:
    """Neither a prompt nor the system message is rendered: their braces are in the tokens as they are."""
    own = tokenizer(template)
    spec = prompts_file(tmp_path, TEXT)
    found = load_prompts(spec if template else spec.model_copy(update={"system": None}), own)
    prompt = next(one for one in (*found.train, *found.held_out) if one.text == TEXT)
    shown = own.decode(prompt.token_ids, skip_special_tokens=True)
    assert shown.count(TEXT) == (2 if template else 1)
    assert "49" not in shown


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{% for x in range(10 ** 9) %}x{% endfor %}",
    "{{ messages.append(1) }}",
    "{{ 1 / 0 }}",
    "{{ none.x.y }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('no') }}",
    "{{",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_hostile_chat_template_is_one_line(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers renders a model's template in jinja2's sandbox: it reaches no attribute that leads to code, cannot
    change what it is given and loops at most 100,000 times."""
    monkeypatch.chdir(tmp_path)
    spec = prompts_file(tmp_path, "x").model_copy(update={"system": None})
    with pytest.raises(DataError, match="chat template refuses it"):
        load_prompts(spec, tokenizer(template))
    assert not (tmp_path / "ran").exists()


def test_a_judges_request_holds_an_answer_as_it_is() -> None:
    """Fields of our own templates are filled in one pass (test_llm_prompts.py has more)."""
    from judges.llm_prompts import Template, own_template

    template = Template(own_template("score"), slots=("prompt", "answer"), plain=("criteria", "low", "high"))
    filled = template.fill({"prompt": "{answer}", "answer": TEXT}, {"criteria": "c", "low": "1", "high": "9"})
    assert TEXT in filled.user and filled.user.count("{answer}") == 1


def test_a_message_keeps_its_braces() -> None:
    from judges.llm_prompts import conversation
    from online_dpo.types import Prompt

    turns = (Message("user", TEXT), Message("assistant", "{0}"), Message("user", "%s"))
    assert conversation(Prompt("p", turns, (1,))).count(TEXT) == 1


# --- datasets ---


def planted_folder(folder: Path, *, with_data: bool) -> Path:
    """A dataset's folder with a loading script, as the hub once had them."""
    folder.mkdir()
    (folder / f"{folder.name}.py").write_text(EVIL.format(marker=str(folder / "ran")), encoding="utf-8")
    if with_data:
        (folder / "train.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n{"prompt": "z"}', encoding="utf-8")
    return folder


def rows_of(path: Path) -> Any:
    return read_rows(PromptsSpec(path=str(path), per_round=1, held_out=1), [])


READS: tuple[Callable[[Path], Path], ...] = (
    lambda folder: planted_folder(folder, with_data=False),
    lambda folder: planted_folder(folder, with_data=False) / f"{folder.name}.py",
    lambda folder: planted_folder(folder, with_data=True) / f"{folder.name}.py",
)


@pytest.mark.parametrize("read", READS)
def test_a_datasets_script_is_refused(tmp_path: Path, read: Callable[[Path], Path]) -> None:
    folder = tmp_path / "planted"
    with pytest.raises(DataError):
        rows_of(read(folder))
    assert not (folder / "ran").exists()


def test_a_script_beside_data_is_not_run(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path / "planted", with_data=True)
    try:
        rows = rows_of(folder)
    except DataError:
        rows = None
    assert rows is None or len(rows) == 3
    assert not (folder / "ran").exists()


def test_a_tokenizers_own_code_does_not_run(model: Path) -> None:
    marker = model / "ran"
    (model / "tokenization_evil.py").write_text(EVIL.format(marker=str(marker)), encoding="utf-8")
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Builder", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        load_tokenizer(model)
    except ModelError as error:
        assert len(str(error).splitlines()) == 1
    assert not marker.exists()
