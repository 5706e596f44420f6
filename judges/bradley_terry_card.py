"""What is known of a fitted judge: its figures on held-out pairs, as JSON and as a page to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from judges.bradley_terry_features import Floats
from online_dpo.measure import Interval, paired_change, win_rate

BINS = 5


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs whose more likely answer had a probability in one range: how many, and how often it was the chosen one."""

    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Figures:
    """One way to score, on held-out pairs.

    `accuracy` has Wilson's interval over the pairs, `folds` one accuracy a fold and `over_folds` their mean with
    Student's interval; `gain` is accuracy minus that of "the longer answer wins", pair by pair, with a bootstrap
    interval. `brier` and `log_loss` are ¼ and ln 2 for a judge that always says ½. `prefers_longer` is the share of
    pairs of unequal length where the longer answer scored higher.
    """

    accuracy: Interval
    folds: tuple[float, ...]
    over_folds: Interval
    gain: Interval
    brier: float
    log_loss: float
    prefers_longer: float
    reliability: tuple[Bin, ...]


@dataclass(frozen=True)
class Card:
    """A fit's settings, its figures without and with length, and how long it took."""

    source: str
    pairs: int
    prompts: int
    folds: int
    seed: int
    settings: dict[str, Any]
    longer_wins: Interval
    controlled: Figures
    with_length: Figures
    fit_seconds: float
    validation_seconds: float

    @property
    def verdict(self) -> str:
        """One sentence a way to score: whether it beats "the longer answer wins" on pairs that it had not seen."""
        return (
            f"Without length, the judge {_beats(self.controlled.gain)} 'the longer answer wins'. "
            f"With length, it {_beats(self.with_length.gain)} it."
        )

    def as_dict(self) -> dict[str, Any]:
        """The card for JSON: intervals as {mean, low, high}, None where a figure does not exist."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain | {"verdict": self.verdict}


def figures(margins: Floats, lengths: Floats, folds: Floats) -> Figures:
    """The figures of held-out `margins`, score(chosen) − score(rejected) in log-odds, shape (pairs,).

    `lengths` are the differences of the answers' lengths in the same sense, `folds` each pair's fold.
    """
    nothing = np.zeros_like(margins)
    right, longer = credit(margins), credit(lengths)
    by_fold = tuple(float(right[folds == fold].mean()) for fold in np.unique(folds))
    unequal = (lengths != 0) & (margins != 0)
    chances = 1 / (1 + np.exp(-margins))
    return Figures(
        accuracy=win_rate(margins.tolist(), nothing.tolist()),
        folds=by_fold,
        over_folds=over_folds(by_fold),
        gain=paired_change(right, longer),
        brier=float(np.mean((1 - chances) ** 2)),
        log_loss=float(np.logaddexp(0, -margins).mean()),
        prefers_longer=float(np.mean((margins > 0)[unequal] == (lengths > 0)[unequal])) if unequal.any() else math.nan,
        reliability=reliability(margins),
    )


def credit(margins: Floats) -> Floats:
    """1 where the chosen answer is ahead, ½ at a tie, 0 where it is behind."""
    right: Floats = (margins > 0) + 0.5 * (margins == 0)
    return right


def over_folds(accuracies: Sequence[float]) -> Interval:
    """The mean of the folds' accuracies with Student's interval (95%, folds − 1 degrees of freedom).

    The folds' judges share most of their training pairs, so that it is somewhat too narrow (Bengio and Grandvalet
    2004).
    """
    from scipy.stats import t

    data = np.asarray(accuracies, np.float64)
    half = t.ppf(0.975, data.size - 1) * data.std(ddof=1) / math.sqrt(data.size)
    return Interval(float(data.mean()), float(data.mean() - half), float(data.mean() + half), data.size)


def reliability(margins: Floats) -> tuple[Bin, ...]:
    """`BINS` equal ranges of the more likely answer's probability, ½ to 1; empty ones are left out."""
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    places = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    right = credit(margins)
    return tuple(
        Bin(int(inside.sum()), float(sure[inside].mean()), float(right[inside].mean()))
        for inside in (places == place for place in range(BINS))
        if inside.any()
    )


def page(card: Card) -> str:
    """The card as Markdown."""
    ways = (("without length", card.controlled), ("with length (`length: true`)", card.with_length))
    rows = [
        f"| {name} | {_share(one.accuracy)} | {_share(one.over_folds)} | {_share(one.gain, '+')} | {one.brier:.4f} "
        f"| {one.log_loss:.4f} | {one.prefers_longer:.3f} |"
        for name, one in ways
    ]
    bins = [
        f"| {name} | {one.n} | {one.confidence:.3f} | {one.accuracy:.3f} |"
        for name, way in ways
        for one in way.reliability
    ]
    return "\n".join(
        [
            "# A Bradley-Terry judge",
            "",
            f"Fitted to {card.pairs} preference pairs on {card.prompts} prompts. {card.verdict}",
            "",
            f"`judges.bradley_terry:BradleyTerryJudge` reads this folder. Every figure is over pairs held out in "
            f"{card.folds}-fold cross-validation; pairs of one prompt are in one fold. Intervals are 95%.",
            "",
            f'"The longer answer wins" (characters, ties one half): {_share(card.longer_wins)}; '
            f'"the shorter wins": {1 - card.longer_wins.mean:.3f}.',
            "",
            "| score | right, over pairs | right, over folds | minus longer wins | Brier | log loss | prefers longer |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "A judge that always says ½ has Brier 0.2500 and log loss 0.6931.",
            "",
            "| score | pairs | mean confidence | accuracy |",
            "|---|---|---|---|",
            *bins,
            "",
            f"Settings: {', '.join(f'{key} {value}' for key, value in card.settings.items())}, seed {card.seed}. "
            f"Fitted in {card.fit_seconds:.1f} s, cross-validated in {card.validation_seconds:.1f} s.",
            "",
        ]
    )


def _beats(gain: Interval) -> str:
    if gain.low > 0:
        return "beats"
    return "is worse than" if gain.high < 0 else "cannot be told from"


def _share(value: Interval, sign: str = "") -> str:
    return f"{value.mean:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
