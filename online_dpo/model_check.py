"""Whether a model can be what an experiment makes of it, before anything is sampled: built from its files as it will be
loaded, but without a byte of its weights (PyTorch's "meta" device)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from online_dpo.config import Experiment
from online_dpo.dataset_rows import DatasetRows
from online_dpo.errors import ConfigError, ModelError, nearest, one_line
from online_dpo.model_config import context_length, end_token_ids, read_config
from online_dpo.models import ResolvedModel, quiet
from online_dpo.types import Pair, Prompt

OTHER_TASK = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]")
"""Of an architecture's name: a model with another head, whose own a language model would lack."""
ROWS = 4
"""Of every tensor, looked at for NaN."""
SHOWN = 3
"""Names of missing weights that a message repeats."""


def check_model(experiment: Experiment, model: ResolvedModel) -> int:
    """Build the model and, where there is one, its adapter; returns for how many tokens it has an embedding.

    Raises `ModelError`: no causal language model, code of its own that was not allowed, weights that are not there or
    have another shape than config.json says, an adapter that does not fit it.
    """
    label = f"model '{experiment.model}'"
    end_token_ids(model.path)
    built = _built(model.path, label, experiment.trust_remote_code)
    rows = int(built.get_input_embeddings().weight.shape[0])
    if experiment.lora is not None:
        from online_dpo.backends.adapter import with_adapter

        with_adapter(built, experiment.lora, experiment.model)
    return rows


def check_length(experiment: Experiment, model: Path, needed: int) -> None:
    """Raise `ConfigError` where the model in folder `model` was made for fewer than `needed` tokens in sequence."""
    longest, room = context_length(model), experiment.engine.max_model_len
    if longest is not None and room is not None and longest < room:
        raise ConfigError(
            f"engine.max_model_len is {room}, and model '{experiment.model}' takes {longest} tokens (its config.json)"
        )
    if longest is not None and longest < needed:
        raise ConfigError(
            f"model '{experiment.model}' takes {longest} tokens (its config.json), and the longest prompt with its "
            f"answer needs {needed}: set sampling.max_tokens, evaluation.max_tokens or prompts.max_tokens lower"
        )


def check_tokens(
    experiment: Experiment,
    rows: int,
    prompts: Sequence[Prompt],
    datasets: Sequence[DatasetRows] = (),
    pairs: Sequence[Pair] = (),
) -> None:
    """Raise `ModelError` where the tokenizer has written a token that the model, with `rows` embeddings, has not."""
    largest = max(
        (max(token_ids, default=0) for token_ids in _all_tokens(prompts, datasets, pairs)),
        default=0,
    )
    if largest >= rows:
        raise ModelError(
            f"model '{experiment.model}': its tokenizer writes token {largest}, and the model has the tokens 0 to "
            f"{rows - 1} alone: the tokenizer is another model's, or tokens were added to it and not to the weights"
        )


def describe_end(model: Path) -> list[str]:
    """A line where the model in folder `model` names no token that ends an answer; else none."""
    if end_token_ids(model):
        return []
    return ["model: it names no end-of-text token, so every answer runs to sampling.max_tokens"]


def _all_tokens(
    prompts: Sequence[Prompt], datasets: Sequence[DatasetRows], pairs: Sequence[Pair]
) -> Iterator[Sequence[int]]:
    yield from (prompt.token_ids for prompt in prompts)
    for data in datasets:
        for row in data.rows:
            yield row.prompt.token_ids
            yield from (answer.token_ids for answer in (row.chosen, row.rejected) if answer is not None)
    for pair in pairs:
        yield from (pair.prompt.token_ids, pair.chosen.token_ids, pair.rejected.token_ids)


def _built(path: Path, label: str, trust_remote_code: bool) -> Any:
    """The model of folder `path` on the meta device, its weights' names and shapes held against its files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_known(path, label, trust_remote_code)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
            _check_head(config, label)
            built, report = AutoModelForCausalLM.from_pretrained(
                path,
                device_map="meta",
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
            )
    except ModelError:
        raise
    except Exception as error:  # a configuration may hold anything, and code of the model's own may raise anything
        raise ModelError(f"{label} cannot be built: {one_line(error.__cause__ or error)}") from error
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"{label}: its weights are not those of its config.json: {name} is {_shape(found)} there and should be "
            f"{_shape(wanted)}"
        )
    lacking = sorted(report["missing_keys"])
    if lacking:
        more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
        raise ModelError(
            f"{label} lacks weights that its config.json asks for ({', '.join(lacking[:SHOWN])}{more}): "
            "they would be random"
        )
    _check_finite(path, label)
    return built


def _check_finite(path: Path, label: str) -> None:
    """Look at the first numbers of every tensor: training that failed leaves NaN everywhere, and reading all weights
    takes minutes for a large model. What is left is found by the initial policy's probe."""
    import torch
    from safetensors import safe_open

    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                part = tensors.get_slice(name)
                some = part[:ROWS] if part.get_shape() else tensors.get_tensor(name)
                if some.is_floating_point() and not torch.isfinite(some.float()).all():
                    raise ModelError(
                        f"{label}: {file.name} holds NaN or infinity in {name}: training on it failed once"
                    )


def _check_known(path: Path, label: str, trust_remote_code: bool) -> None:
    """Whether transformers, or code of the model's own that may run, knows this kind of model."""
    import transformers

    config = read_config(path)
    kind = config.get("model_type")
    if kind in transformers.CONFIG_MAPPING or ("auto_map" in config and trust_remote_code):
        return
    if "auto_map" in config:
        raise ModelError(
            f"{label} is built by code of its own (in {path}), which would run on this machine: read it, then set "
            "trust_remote_code: true"
        )
    if kind is None:
        raise ModelError(f"{label}: its config.json names no model_type")
    raise ModelError(
        f"{label}: transformers {transformers.__version__} knows no model_type '{kind!s:.80}'"
        f"{nearest(str(kind), transformers.CONFIG_MAPPING)}"
    )


def _check_head(config: Any, label: str) -> None:
    """Whether the model predicts the next token, by its architecture's name and by what transformers can make of it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    names = [name for name in config.architectures or [] if isinstance(name, str)]
    other = bool(names) and all(OTHER_TASK.search(name) for name in names)
    if other or not (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "auto_map", None)):
        raise ModelError(
            f"{label} is a {(*names, type(config).__name__)[0]}, not a causal language model (…ForCausalLM)"
        )


def _shape(size: Any) -> str:
    return " × ".join(map(str, size)) or "one number"
