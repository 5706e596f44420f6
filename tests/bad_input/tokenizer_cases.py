"""Tokenizers that are not there, broken, another model's, or without what prompts ask of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from case import Case
from tiny_models import CHAT, copy, edit_json, gpt2, kept, llama

from experiments import write_rows, written

Change = Callable[[Path], object]
CHATS = [{"prompt": [{"role": "user", "content": f"Tell me of number {i}."}]} for i in range(9)]
SYSTEM = [{"prompt": [{"role": "system", "content": "Be brief."}, *row["prompt"]]} for row in CHATS]
ROLES = [{"prompt": [{"role": "wizard", "content": "Hm."}, *row["prompt"]]} for row in CHATS]
PROMPTS = {"path": "prompts.jsonl", "per_round": 2, "held_out": 2, "max_tokens": 64}


def with_tokenizer(
    change: Change, rows: list[dict[str, Any]] | None = None, command: str = "check", **settings: Any
) -> Callable[[Path], list[str]]:
    """`check` with the Llama whose tokenizer was changed; `rows`: other prompts."""

    def arrange(folder: Path) -> list[str]:
        change(copy(llama, folder / "model"))
        line = written(folder, command, model="model", **settings)
        if rows is not None:
            write_rows(folder / "prompts.jsonl", rows)
        return line

    return arrange


def nothing(model: Path) -> None:
    """As it is: plain text, no chat template."""


def without(*names: str) -> Change:
    """Without these special tokens."""

    def change(model: Path) -> None:
        edit_json(model / "tokenizer_config.json", **dict.fromkeys(names))
        for file in (model / "config.json", model / "generation_config.json"):
            edit_json(file, **{f"{name}_id": None for name in names})

    return change


def template(text: Any) -> Change:
    return lambda model: edit_json(model / "tokenizer_config.json", chat_template=text)


def no_files(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def text(name: str, content: str) -> Change:
    return lambda model: (model / name).write_text(content, encoding="utf-8")


def cut(model: Path) -> None:
    file = model / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:500])


def shifted(model: Path) -> None:
    """Its numbers begin where the model's end: a tokenizer of a model with more tokens."""
    file = model / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    data["model"]["vocab"] = {token: number + 1000 for token, number in data["model"]["vocab"].items()}
    file.write_text(json.dumps(data), encoding="utf-8")


def added(model: Path) -> None:
    """A token was added to the tokenizer and the embedding was not made larger."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["number"])
    tokenizer.save_pretrained(model)


def larger_embedding(model: Path) -> None:
    """More rows than tokens, as models are padded to a multiple of 64."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros(61, weights[name].shape[1])])
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    edit_json(model / "config.json", vocab_size=320)


def vocabulary_alone(model: Path) -> None:
    """GPT-2's two files of text, one of them lost."""
    no_files(model)
    (model / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    edit_json(model / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])


def vocabulary_of_gpt2(folder: Path) -> list[str]:
    model = copy(gpt2, folder / "model")
    no_files(model)
    (model / "vocab.json").write_text("[]", encoding="utf-8")
    (model / "merges.txt").write_text("", encoding="utf-8")
    return written(folder, model="model")


def unknown_class(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", tokenizer_class="LamaTokenizer")


def own_code(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")


def template_file(folder: Path) -> list[str]:
    (folder / "chta.jinja").write_text(CHAT, encoding="utf-8")
    return written(folder, prompts=PROMPTS | {"template": "chat.jinja"})


def template_folder(folder: Path) -> list[str]:
    (folder / "chat").mkdir()
    return written(folder, prompts=PROMPTS | {"template": "chat"})


def template_of_no_text(folder: Path) -> list[str]:
    (folder / "c.jinja").write_bytes(b"\xff\xfe\xfa")
    return written(folder, prompts=PROMPTS | {"template": "c.jinja"})


def faults_without_padding(folder: Path) -> list[str]:
    without("pad_token", "eos_token", "bos_token")(copy(llama, folder / "model"))
    return written(folder, model="model", dpo={"batch_size": 2, "faults": {"score_padding": True}})


def dataset_of_chats(folder: Path) -> list[str]:
    """Chats of two questions behind a tokenizer without a chat template."""
    turns = [("user", "One?"), ("assistant", "Two."), ("user", "Three?")]
    chat = [{"role": role, "content": content} for role, content in turns]
    rows = [{"prompt": chat, "chosen": f"Yes {i}.", "rejected": "No."} for i in range(4)]
    write_rows(folder / "pairs.jsonl", rows)
    return written(folder, arms={"offline": {"source": {"dataset": "pairs.jsonl"}}})


def sentencepiece(model: Path) -> None:
    no_files(model)
    (model / "tokenizer.model").write_bytes(b"\x0a\x0enot a model of it")


def of_another_model(model: Path) -> None:
    shutil.copytree(kept(gpt2), model, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))


CASES: tuple[Case, ...] = (
    Case("tokenizer: no files", with_tokenizer(no_files), r"the folder has no tokenizer"),
    Case(
        "tokenizer: tokenizer.json is no JSON",
        with_tokenizer(text("tokenizer.json", "{{")),
        r"tokenizer\.json is not valid JSON",
    ),
    Case("tokenizer: tokenizer.json is cut off", with_tokenizer(cut), r"tokenizer\.json is not valid JSON"),
    Case(
        "tokenizer: tokenizer.json is empty",
        with_tokenizer(text("tokenizer.json", "")),
        r"tokenizer\.json is not valid JSON",
    ),
    Case(
        "tokenizer: tokenizer.json is a list",
        with_tokenizer(text("tokenizer.json", "[]")),
        r"a mapping of keys is expected, found list",
    ),
    Case(
        "tokenizer: tokenizer.json is another mapping",
        with_tokenizer(text("tokenizer.json", '{"a": 1}')),
        r"tokenizer .*does not load",
    ),
    Case(
        "tokenizer: tokenizer_config.json is no JSON",
        with_tokenizer(text("tokenizer_config.json", "{")),
        r"tokenizer_config\.json is not valid JSON",
    ),
    Case(
        "tokenizer: tokenizer_config.json is a list",
        with_tokenizer(text("tokenizer_config.json", "[]")),
        r"a mapping of keys is expected, found list",
    ),
    Case(
        "tokenizer: a Git LFS pointer",
        with_tokenizer(text("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n")),
        r"tokenizer\.json is not valid JSON",
    ),
    Case("tokenizer: a sentencepiece model that is none", with_tokenizer(sentencepiece), r"tokenizer .*does not load"),
    Case("tokenizer: a vocabulary that is a list", vocabulary_of_gpt2, r"tokenizer .*does not load"),
    Case("tokenizer: code of its own", with_tokenizer(own_code), r"tokenizer .* is code of its own.*trust_remote_code"),
    Case(
        "tokenizer: a class nobody knows is passed over",
        with_tokenizer(unknown_class),
        r"prompts: 7 to train",
        goes_on=True,
    ),
    Case(
        "tokenizer: another model's files",
        with_tokenizer(of_another_model),
        r"cannot be built|lacks weights|are not those",
    ),
    Case(
        "tokenizer: of a larger vocabulary",
        with_tokenizer(shifted),
        r"its tokenizer writes token 1\d\d\d, and the model has the tokens 0 to 258 alone",
    ),
    Case(
        "tokenizer: a token that the embedding has not",
        with_tokenizer(added),
        r"its tokenizer writes token 259, and the model has the tokens 0 to 258 alone",
    ),
    Case(
        "tokenizer: an added token that no prompt uses",
        with_tokenizer(added, [{"prompt": f"Question {i}"} for i in range(9)]),
        r"prompts: 7 to train",
        goes_on=True,
    ),
    Case(
        "tokenizer: an embedding with more rows than tokens",
        with_tokenizer(larger_embedding),
        r"prompts: 7 to train",
        goes_on=True,
    ),
    Case("tokenizer: no padding token", with_tokenizer(without("pad_token")), r"prompts: 7 to train", goes_on=True),
    Case("tokenizer: no begin token", with_tokenizer(without("bos_token")), r"prompts: 7 to train", goes_on=True),
    Case("tokenizer: no end token", with_tokenizer(without("eos_token")), r"names no end-of-text token", goes_on=True),
    Case(
        "tokenizer: none of the three",
        with_tokenizer(without("pad_token", "bos_token", "eos_token")),
        r"names no end-of-text token",
        goes_on=True,
    ),
    Case(
        "tokenizer: padding is scored and there is none",
        faults_without_padding,
        r"has neither a padding nor an end token",
    ),
    Case(
        "chat: chats without a chat template",
        with_tokenizer(nothing, SYSTEM),
        r"has no chat template, so a prompt is one plain text",
    ),
    Case(
        "chat: a lone question without a chat template is plain text",
        with_tokenizer(nothing, CHATS),
        r"prompts: 7 to train",
        goes_on=True,
    ),
    Case(
        "chat: a system message without a chat template",
        with_tokenizer(nothing, prompts=PROMPTS | {"system": "Be brief."}),
        r"has no chat template",
    ),
    Case("chat: pairs of long chats without a chat template", dataset_of_chats, r"has no chat template"),
    Case(
        "chat: a template that is no Jinja",
        with_tokenizer(template("{% for m in messages %}")),
        r"the model's chat template refuses it: TemplateSyntaxError",
    ),
    Case(
        "chat: a template that refuses",
        with_tokenizer(template("{{ raise_exception('Not today.') }}")),
        r"the model's chat template refuses it: TemplateError: Not today\.",
    ),
    Case("chat: a template that knows no such role", with_tokenizer(template(CHAT), ROLES), r"no such role: wizard"),
    Case(
        "chat: a template that divides by nothing",
        with_tokenizer(template("{{ 1 / 0 }}")),
        r"the model's chat template refuses it",
    ),
    Case(
        "chat: a template that reaches for Python",
        with_tokenizer(template("{{ messages.__class__.__mro__ }}")),
        r"the model's chat template refuses it: SecurityError",
    ),
    Case(
        "chat: a template that asks for what is not there",
        with_tokenizer(template("{{ messages[7].content.strip() }}")),
        r"the model's chat template refuses it",
    ),
    Case(
        "chat: a template without end",
        with_tokenizer(template("{% for i in range(10**12) %}x{% endfor %}")),
        r"the model's chat template refuses it",
    ),
    Case(
        "chat: a template that writes nothing",
        with_tokenizer(template("{% if false %}x{% endif %}")),
        r"chat template writes nothing for it",
    ),
    Case("chat: a template that is a number", with_tokenizer(template(7)), r"chat.template"),
    Case(
        "chat: named templates without a default one",
        with_tokenizer(template([{"name": "rag", "template": CHAT}])),
        r"chat template",
    ),
    Case(
        "chat: prompts.template misspelt",
        template_file,
        r"prompts\.template: no file chat\.jinja \(did you mean 'chta\.jinja'\?\)",
    ),
    Case(
        "chat: the word dialogue misspelt",
        lambda f: written(f, prompts=PROMPTS | {"template": "dialog"}),
        r"did you mean 'dialogue'\?",
    ),
    Case(
        "chat: prompts.template is a folder",
        template_folder,
        r"prompts\.template: no file chat",
    ),
    Case(
        "chat: prompts.template is no text",
        template_of_no_text,
        r"prompts\.template: c\.jinja cannot be read",
    ),
)
