"""Judges an answer by a linear reward that was fitted to preference pairs (Bradley and Terry 1952).

P(y_w beats y_l | x) = σ(r(x, y_w) − r(x, y_l)), r(x, y) = w·φ(x, y) / T. `judges.bradley_terry_fit` fits it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from judges.bradley_terry_features import Encoder, Features, Floats, Texts
from online_dpo.errors import JudgeError, one_line
from online_dpo.judging import Item, PointwiseJudge, Score

FORMAT = 1
SETTINGS, NUMBERS, CARD, README = "bradley_terry.json", "bradley_terry.safetensors", "card.json", "README.md"
OWN_FILES = (SETTINGS, NUMBERS, CARD, README)


@dataclass(frozen=True)
class LinearReward:
    """A fitted reward: `weights` (shape (columns,)) on `features`, and `slope` on the log of the answer's length.

    The slope is fitted with the weights, so that it takes up what length explains; a score leaves it out unless it is
    asked for (length control). `temperature` makes the difference of two scores a log-odds; `temperature_length` does
    so for scores with length.
    """

    features: Features
    weights: Floats
    slope: float
    temperature: float
    temperature_length: float

    def scores(self, texts: Texts, *, length: bool = False) -> Floats:
        """Shape (texts,), in log-odds: a difference of ln 3 says that the better one wins three times of four."""
        raw: Floats = self.features.matrix(texts) @ self.weights
        if not length:
            return raw / self.temperature
        return (raw + self.slope * log_lengths(texts)) / self.temperature_length

    def save(self, folder: Path) -> None:
        """Write JSON and safetensors into `folder`; the settings last, so that half a fit is not taken for one."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).unlink(missing_ok=True)
        described, numbers = self.features.state()
        save_file({**numbers, "weights": np.ascontiguousarray(self.weights)}, folder / NUMBERS)
        settings = {
            "format": FORMAT,
            "slope": self.slope,
            "temperature": self.temperature,
            "temperature_length": self.temperature_length,
            "features": described,
        }
        (folder / SETTINGS).write_text(json.dumps(settings, allow_nan=False) + "\n", encoding="utf-8")


def log_lengths(texts: Texts) -> Floats:
    """ln(1 + characters) of the answers, without white space at their ends."""
    return np.log1p(np.array([len(answer.strip()) for _, answer in texts], np.float64))


def load_reward(folder: Path, encoder: str | None = None) -> LinearReward:
    """The reward saved in `folder`. Raises `JudgeError`, one line, where there is none or it is damaged."""
    if not (folder / SETTINGS).is_file():
        advice = "fit one with: online-dpo judge fit PAIRS -o FOLDER"
        raise JudgeError(f"no fitted judge in '{folder}' (no {SETTINGS}); {advice}")
    from safetensors.numpy import load_file

    try:
        settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if settings["format"] != FORMAT:
            raise JudgeError(f"'{folder}' has format {settings['format']}, this version reads {FORMAT}: fit it again")
        numbers = load_file(folder / NUMBERS)
        features = Features.from_state(settings["features"], numbers, Encoder(encoder) if encoder else None)
        names = ("slope", "temperature", "temperature_length")
        reward = LinearReward(features, numbers["weights"], *(float(settings[name]) for name in names))
        columns = features.matrix([("", "")]).shape[1]
    except JudgeError as error:
        raise JudgeError(f"judge in '{folder}': {error}") from error
    except Exception as error:  # a damaged file fails in the JSON reader, safetensors or scikit-learn, each in its way
        raise JudgeError(f"judge in '{folder}' is damaged: {one_line(error)}") from error
    if reward.weights.shape != (columns,) or min(reward.temperature, reward.temperature_length) <= 0:
        raise JudgeError(f"judge in '{folder}' is damaged: {columns} columns, weights of shape {reward.weights.shape}")
    return reward


class BradleyTerryJudge(PointwiseJudge):
    """The fitted reward of the prompt's last message and the answer, in log-odds.

    `model` is a folder that `online-dpo judge fit` wrote. Its `README.md` tells how often the judge was right on
    pairs that it had not seen. `length=True` also counts what the answer's length says, which is left out otherwise.
    `encoder` is the encoder's folder, where the judge was fitted with one.
    """

    batch_prompts = 64
    each_alone = True
    cached = False
    file_params: ClassVar[tuple[str, ...]] = ("model", "encoder")

    def __init__(self, model: str, *, length: bool = False, encoder: str | None = None) -> None:
        if not isinstance(length, bool):
            raise JudgeError(f"BradleyTerryJudge: length must be true or false, found {length!r}")
        self.length = length
        self.reward = load_reward(Path(model).expanduser(), encoder)

    def score_batch(self, items: Sequence[Item]) -> list[Sequence[Score]]:
        """One score per candidate of each item, in log-odds."""
        texts = [(prompt.text, answer.text) for prompt, answers in items for answer in answers]
        scores = iter(self.reward.scores(texts, length=self.length).tolist() if texts else ())
        return [[next(scores) for _ in answers] for _, answers in items]
