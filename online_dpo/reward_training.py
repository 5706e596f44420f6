"""From preferences to a saved reward model and its card."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from online_dpo.display import QuietProgress
from online_dpo.errors import ConfigError, TrainingError, one_line
from online_dpo.files import digest, remove, sync_folder, sync_tree, write_json
from online_dpo.judging import import_object
from online_dpo.models import ResolvedModel, load_tokenizer
from online_dpo.preferences import Preference, PreferenceSet
from online_dpo.reward_card import held_out_figures
from online_dpo.reward_pairs import TokenPair, encode, split_by_prompt
from online_dpo.reward_spec import RewardSpec

if TYPE_CHECKING:
    from online_dpo.backends.reward_cluster import RayRewardTrainer
    from online_dpo.backends.reward_trainer import RewardStep

CARD = "card.json"


@dataclass(frozen=True, slots=True)
class Part:
    """Pairs with their token ids, in one order."""

    preferences: tuple[Preference, ...]
    pairs: tuple[TokenPair, ...]


@dataclass(frozen=True, slots=True)
class Data:
    """The pairs of a training, split."""

    train: Part
    held_out: Part
    dropped: dict[str, int]


def train_reward_model(
    model: ResolvedModel, preferences: PreferenceSet, spec: RewardSpec, out: Path, progress: QuietProgress
) -> dict[str, Any]:
    """Train `model` on `preferences`, save it with its card in folder `out`, and return the card.

    `out` must not exist, or be empty; it is there whole or not at all. Raises `ConfigError`, `DataError`,
    `ModelError` or `TrainingError`, and then has saved nothing.
    """
    out = out.resolve()
    check_free(out)
    data = prepare(model, preferences, spec)
    # Ray reads this when it is imported: all its ports on the loopback address (see `backends.factory`).
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from online_dpo.backends.reward_cluster import reward_workers

    aside = _aside(out)
    progress.say(f"{len(data.train.pairs)} pairs to train on, {len(data.held_out.pairs)} held out; starting workers")
    try:
        with reward_workers(model.path, spec) as trainer:
            steps = _train(trainer, data.train.pairs, spec, progress)
            figures = _evaluate(trainer, data.held_out, spec, progress)
            trainer.save(aside)
        card = {
            "model": {"name": model.name, "digest": model.digest},
            "data": _data_entry(preferences, data),
            "settings": spec.model_dump() | {"lr": spec.rate},
            "training": _training_entry(steps),
            "held_out": figures,
        }
        write_json(aside / CARD, card)
        sync_tree(aside)
        aside.replace(out)
        sync_folder(out.parent)
    finally:
        remove(aside)
    return card


def check_free(out: Path) -> None:
    """Raise `ConfigError` unless a folder can be made at `out`."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} is there already: name a folder that is not, or is empty")


def _aside(out: Path) -> Path:
    """A fresh folder beside `out`: made before the work, so that a disk that cannot be written to shows at once."""
    aside = out.with_name(f".{out.name}.training")
    try:
        remove(aside)
        aside.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {out.parent}: {one_line(error)}") from error
    return aside


def prepare(model: ResolvedModel, preferences: PreferenceSet, spec: RewardSpec) -> Data:
    """Token ids of all pairs that `model` can read, split by prompt."""
    from transformers import AutoConfig

    tokenizer = load_tokenizer(model.path)
    limit = import_object("judges._classifier:token_limit")(
        AutoConfig.from_pretrained(model.path), tokenizer, spec.max_length
    )
    encoded = encode(preferences.pairs, tokenizer, limit)
    train, held_out = (
        Part(tuple(encoded.preferences[i] for i in places), tuple(encoded.pairs[i] for i in places))
        for places in split_by_prompt(encoded.preferences, spec.held_out, spec.seed)
    )
    return Data(train, held_out, {**preferences.dropped, "too_long": encoded.too_long})


def _train(
    trainer: RayRewardTrainer, pairs: Sequence[TokenPair], spec: RewardSpec, progress: QuietProgress
) -> list[RewardStep]:
    progress.start("train", len(pairs) * spec.epochs, "pairs")
    steps = []
    for step in trainer.train(pairs, spec):
        steps.append(step)
        progress.advance(step.pairs, f"loss {step.loss:.3f}, right {100 * step.accuracy:.0f} %")
    progress.finish()
    return steps


def _evaluate(trainer: RayRewardTrainer, part: Part, spec: RewardSpec, progress: QuietProgress) -> dict[str, Any]:
    progress.start("held out", len(part.pairs), "pairs")
    rows = [row for pair in part.pairs for row in (pair.chosen, pair.rejected)]
    scores = trainer.scores(rows, 2 * spec.micro_batch_size)
    if not all(map(math.isfinite, scores)):
        raise TrainingError("a held-out reward is not finite after the last step; nothing was saved")
    progress.advance(len(part.pairs))
    progress.finish()
    return held_out_figures(part.preferences, scores[0::2], scores[1::2], spec.seed)


def _data_entry(preferences: PreferenceSet, data: Data) -> dict[str, Any]:
    file = Path(preferences.source).expanduser()
    return {
        "source": preferences.source,
        "digest": digest(file) if file.exists() else None,
        "train": len(data.train.pairs),
        "held_out": len(data.held_out.pairs),
        "dropped": data.dropped,
    }


def _training_entry(steps: Sequence[RewardStep]) -> dict[str, Any]:
    """`loss_first` and `loss_last`: means over the first and the last tenth of the steps."""
    tenth = max(1, len(steps) // 10)
    seconds = sum(step.seconds for step in steps)
    tokens = sum(step.tokens for step in steps)
    return {
        "steps": len(steps),
        "loss_first": sum(step.loss for step in steps[:tenth]) / tenth,
        "loss_last": sum(step.loss for step in steps[-tenth:]) / tenth,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
    }
