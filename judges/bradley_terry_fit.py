"""Fits a linear reward to preference pairs, calibrates it, and measures it on pairs that it has not seen.

Logistic regression without intercept on differences of features: the maximum-likelihood estimate of Bradley and
Terry's model with a Gaussian prior on the weights (Bradley and Terry 1952; Christiano et al. 2017, equation 1).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from judges.bradley_terry import CARD, OWN_FILES, README, LinearReward, log_lengths
from judges.bradley_terry_card import Card, figures, page
from judges.bradley_terry_features import Encoder, Features, Floats, Texts, fit_features
from online_dpo.errors import DataError, JudgeError, one_line
from online_dpo.measure import win_rate

if TYPE_CHECKING:
    from online_dpo.preferences import Preference

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""C of scikit-learn, the inverse of the penalty on the weights, to choose from."""

INNER_FOLDS = 3
LEAST_PROMPTS = 10
LENGTH_SCALE = 5.0
"""How much larger the length column is than the others: hardly penalised, so that the weights need not stand in."""

Groups = NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """How a reward is fitted. `c` None: chosen by inner cross-validation."""

    min_df: int
    letters: bool
    encoder: Encoder | None
    c: float | None
    seed: int


@dataclass(frozen=True)
class Sides:
    """The pairs as (question, answer), by side, and each pair's prompt as a number: `groups`, shape (pairs,)."""

    chosen: Texts
    rejected: Texts
    groups: Groups

    def __getitem__(self, places: NDArray[np.intp]) -> Sides:
        return Sides([self.chosen[i] for i in places], [self.rejected[i] for i in places], self.groups[places])


def fit(
    pairs: Sequence[Preference],
    out: Path,
    *,
    folds: int = 5,
    seed: int = 0,
    c: float | None = None,
    min_df: int = 2,
    letters: bool = True,
    encoder: str | None = None,
    source: str = "",
    advance: Callable[[int], object] = lambda _: None,
) -> Card:
    """Fit a reward to all `pairs`, save it in folder `out` with its card, and return the card.

    The card's figures are those of `folds` rewards, each fitted by the very same procedure (terms, strength of the
    penalty, temperature) to the other folds; a prompt's pairs are in one fold. `advance(1)` is called after each of the
    `folds` + 1 fits.
    Raises `DataError` for too few prompts or terms, `JudgeError` for a wrong setting or a folder with other files.
    """
    _check(out, folds, c, min_df)
    sides = as_sides(pairs)
    prompts = _enough_prompts(sides, folds, source)
    recipe = Recipe(min_df, letters, Encoder(encoder, keep=True) if encoder else None, c, seed)
    started = time.perf_counter()
    reward, strength = train(sides, recipe)
    fitted = time.perf_counter()
    advance(1)
    controlled, with_length, fold_of = _held_out(sides, recipe, folds, advance)
    validated = time.perf_counter()
    lengths = _longer(sides)
    card = Card(
        source=source,
        pairs=len(sides.chosen),
        prompts=prompts,
        folds=folds,
        seed=seed,
        settings=_settings(reward, recipe, strength),
        longer_wins=win_rate(lengths.tolist(), np.zeros_like(lengths).tolist()),
        controlled=figures(controlled, lengths, fold_of),
        with_length=figures(with_length, lengths, fold_of),
        fit_seconds=fitted - started,
        validation_seconds=validated - fitted,
    )
    reward.save(out)
    (out / CARD).write_text(json.dumps(card.as_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (out / README).write_text(page(card), encoding="utf-8")
    return card


def _enough_prompts(sides: Sides, folds: int, source: str) -> int:
    """The number of different prompts; `DataError` where they are too few for the folds."""
    prompts, least = len(np.unique(sides.groups)), max(LEAST_PROMPTS, 2 * folds)
    if prompts < least:
        raise DataError(f"{source or 'pairs'}: {prompts} different prompts; {folds} folds need at least {least}")
    return prompts


def _settings(reward: LinearReward, recipe: Recipe, strength: float) -> dict[str, Any]:
    """What the card says of how the reward was fitted."""
    return {
        "c": strength,
        "min_df": recipe.min_df,
        "letters": recipe.letters,
        "encoder": recipe.encoder.digest if recipe.encoder else None,
        "columns": len(reward.weights),
        "temperature": reward.temperature,
    }


def as_sides(pairs: Sequence[Preference]) -> Sides:
    """The pairs as the features take them; pairs with the same messages share a group."""
    numbers: dict[Any, int] = {}
    groups = [numbers.setdefault(pair.messages, len(numbers)) for pair in pairs]
    questions = [pair.messages[-1].content for pair in pairs]
    return Sides(
        list(zip(questions, (pair.chosen for pair in pairs), strict=True)),
        list(zip(questions, (pair.rejected for pair in pairs), strict=True)),
        np.array(groups, np.int64),
    )


def train(sides: Sides, recipe: Recipe) -> tuple[LinearReward, float]:
    """A reward fitted to all of `sides`, and the strength C that it was fitted with.

    C has the least log loss over `INNER_FOLDS` folds of the prompts, length included. The margins held out there then
    give the temperatures (Platt scaling without intercept; Guo et al. 2017). Terms and their weights come from all
    answers of `sides`, also those held out inside: they hold no choice.
    """
    try:
        features = fit_features(
            sides.chosen, sides.rejected, min_df=recipe.min_df, letters=recipe.letters, encoder=recipe.encoder
        )
    except ValueError as error:  # scikit-learn's, when no term is frequent enough
        raise DataError(f"no term is in {recipe.min_df} answers ({one_line(error)}): lower min_df") from error
    apart = log_lengths(sides.chosen) - log_lengths(sides.rejected)
    scale = LENGTH_SCALE / (float(np.sqrt(np.mean(apart**2))) or 1.0)
    columns = _differences(features, sides, scale * apart)
    inner = [_inner_margins(columns, sides.groups, c, recipe.seed) for c in _strengths(recipe)]
    best = min(range(len(inner)), key=lambda place: float(np.logaddexp(0, -inner[place][1]).mean()))
    strength = _strengths(recipe)[best]
    weights = solve(columns, strength, recipe.seed)
    without, with_length = (temperature(margins) for margins in inner[best])
    return LinearReward(features, weights[:-1], float(weights[-1]) * scale, without, with_length), strength


def solve(columns: Any, c: float, seed: int) -> Floats:
    """The weights w (shape (columns,)) with the least Σ ln(1 + e^(−w·d)) + |w|²/(2c) over the rows d of `columns`.

    scikit-learn wants two classes. The loss of (−d, lost) is that of (d, won), so rows may be turned round at will.
    """
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression

    rows = columns.shape[0]
    signs = np.where(np.random.default_rng(seed).permutation(rows) % 2 == 0, 1.0, -1.0)
    # newton-cg: the columns differ in scale, and lbfgs stops short of the minimum then.
    model = LogisticRegression(C=c, fit_intercept=False, solver="newton-cg", max_iter=500, tol=1e-6)
    model.fit(sparse.diags_array(signs) @ columns, signs)
    weights: Floats = model.coef_[0]
    return weights


def temperature(margins: Floats) -> float:
    """The T > 0 with the least Σ ln(1 + e^(−margin/T)): between e⁻⁷ and e⁷, so that no judge is turned round."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(lambda log: np.logaddexp(0, -margins * np.exp(-log)).mean(), bounds=(-7, 7))
    return float(np.exp(found.x))


def _held_out(
    sides: Sides, recipe: Recipe, folds: int, advance: Callable[[int], object]
) -> tuple[Floats, Floats, Floats]:
    """Each pair's margin without and with length from a reward that has not seen its prompt, and its fold."""
    controlled, with_length, fold_of = (np.zeros(len(sides.chosen)) for _ in range(3))
    for number, (seen, unseen) in enumerate(_splits(sides.groups, folds, recipe.seed), start=1):
        reward, _ = train(sides[seen], recipe)
        apart = sides[unseen]
        controlled[unseen] = reward.scores(apart.chosen) - reward.scores(apart.rejected)
        with_length[unseen] = reward.scores(apart.chosen, length=True) - reward.scores(apart.rejected, length=True)
        fold_of[unseen] = number
        advance(1)
    return controlled, with_length, fold_of


def _inner_margins(columns: Any, groups: Groups, c: float, seed: int) -> tuple[Floats, Floats]:
    """Held-out margins of each row without and with its last column, which is length."""
    without, with_length = np.zeros(columns.shape[0]), np.zeros(columns.shape[0])
    for seen, unseen in _splits(groups, INNER_FOLDS, seed + 1):
        weights = solve(columns[seen], c, seed)
        with_length[unseen] = columns[unseen] @ weights
        weights[-1] = 0.0
        without[unseen] = columns[unseen] @ weights
    return without, with_length


def _splits(groups: Groups, folds: int, seed: int) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    from sklearn.model_selection import GroupKFold

    yield from GroupKFold(folds, shuffle=True, random_state=seed).split(groups, groups=groups)


def _differences(features: Features, sides: Sides, length: Floats) -> Any:
    """φ(x, chosen) − φ(x, rejected), and `length` as the last column: sparse, shape (pairs, columns + 1)."""
    from scipy import sparse

    apart = features.matrix(sides.chosen) - features.matrix(sides.rejected)
    return sparse.hstack([apart, sparse.csr_matrix(length[:, None])], format="csr")


def _longer(sides: Sides) -> Floats:
    """Length of the chosen minus length of the rejected answer, in characters."""
    both = zip(sides.chosen, sides.rejected, strict=True)
    return np.array([len(won.strip()) - len(lost.strip()) for (_, won), (_, lost) in both], np.float64)


def _strengths(recipe: Recipe) -> tuple[float, ...]:
    return STRENGTHS if recipe.c is None else (recipe.c,)


def _check(out: Path, folds: int, c: float | None, min_df: int) -> None:
    if folds < 2:
        raise JudgeError(f"folds must be at least 2, got {folds}")
    if c is not None and not 0 < c < float("inf"):
        raise JudgeError(f"c must be above 0, got {c}")
    if min_df < 1:
        raise JudgeError(f"min_df must be at least 1, got {min_df}")
    if out.exists() and not out.is_dir():
        raise JudgeError(f"'{out}' is a file; name a folder")
    other = sorted(file.name for file in out.iterdir() if file.name not in OWN_FILES) if out.is_dir() else []
    if other:
        raise JudgeError(f"'{out}' holds other files than a fitted judge's ({other[0]}): name a new folder")
