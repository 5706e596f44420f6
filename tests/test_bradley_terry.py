"""The linear reward: its estimate by hand, what it holds back of length, what it saves, and its figures."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from typer.testing import CliRunner

from judges import bradley_terry_fit
from judges.bradley_terry import BradleyTerryJudge, LinearReward, load_reward
from judges.bradley_terry_card import credit, figures, over_folds, reliability
from judges.bradley_terry_features import Encoder, overlap
from judges.bradley_terry_fit import Recipe, as_sides, fit, solve, temperature, train
from online_dpo.commands.judge_fit import judge_fit
from online_dpo.config import JudgeSpec
from online_dpo.errors import DataError, JudgeError
from online_dpo.judging import open_judge
from online_dpo.preferences import Preference, as_comparison, load_preferences
from online_dpo.types import Message

TLDR = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "pairs" / "tldr-batch13.jsonl"
WORDS = ("red", "blue", "green", "cat", "dog", "bird", "house", "tree", "sun", "moon", "small", "runs", "sleeps")


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def preference(number: int, question: str, chosen: str, rejected: str) -> Preference:
    return Preference(str(number), (Message("user", question),), chosen, rejected)


def polite(count: int = 60, seed: int = 0) -> list[Preference]:
    """Pairs whose chosen answer begins with "please", the other with a word as long: length says next to nothing."""
    draw = random.Random(seed)
    return [
        preference(i, f"question {i}", f"please {words(draw, 5)}", f"sullen {words(draw, 5)}") for i in range(count)
    ]


def longer(count: int = 120) -> list[Preference]:
    """Pairs whose chosen answer has more of the same words: 8 to 16 against 3 to 7. Length alone tells them apart."""
    draw = random.Random(1)
    return [
        preference(i, f"question {i}", words(draw, draw.randint(8, 16)), words(draw, draw.randint(3, 7)))
        for i in range(count)
    ]


def reward_of(pairs: list[Preference], *, letters: bool = False, encoder: Encoder | None = None) -> LinearReward:
    recipe = Recipe(min_df=1, letters=letters, encoder=encoder, c=1.0, seed=0)
    return train(as_sides(pairs), recipe)[0]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge fitted to polite pairs. Read only."""
    folder = tmp_path_factory.mktemp("judges") / "polite"
    fit(polite(), folder, folds=3, letters=False, source="polite.jsonl")
    return folder


# --- the estimate ---


def test_weight_is_the_log_odds_of_winning() -> None:
    """One column: 3 rows +1 (the feature won) and 1 row −1. The loss 3 ln(1 + e^−w) + ln(1 + e^w) is least where
    3 σ(−w) = σ(w), so w = ln 3; a penalty of w²/(2·10⁶) moves it by less than 10⁻⁵."""
    [weight] = solve(sparse.csr_matrix([[1.0], [1.0], [1.0], [-1.0]]), c=1e6, seed=0)
    assert weight == pytest.approx(math.log(3), abs=1e-4)


def test_weights_are_where_the_penalised_loss_is_flat() -> None:
    """Σ_d σ(−w·d) d = w / c at the minimum, whichever rows were turned round to make two classes."""
    rows = np.random.default_rng(3).normal(size=(40, 5))
    for seed in (0, 1):
        weights = solve(sparse.csr_matrix(rows), c=0.7, seed=seed)
        pull = (rows / (1 + np.exp(rows @ weights))[:, None]).sum(axis=0)
        assert pull == pytest.approx(weights / 0.7, abs=1e-4)


def test_temperature_makes_margins_log_odds() -> None:
    """Margins +2 three times and −2 once: right three times of four, so 2/T = ln 3."""
    assert temperature(np.array([2.0, 2.0, 2.0, -2.0])) == pytest.approx(2 / math.log(3), rel=1e-4)


def test_temperature_never_turns_a_judge_round() -> None:
    assert temperature(np.array([-1.0, -2.0])) > 100


def test_overlap_is_what_the_question_has_too() -> None:
    """ "the cat sat down": the, cat, sat are asked (3 of 4); "the cat" and "cat sat" are asked pairs (2 of 3)."""
    assert overlap("Why The cat sat", "the cat sat down") == (3 / 4, 2 / 3)
    assert overlap("", "word") == overlap("word", "") == (0.0, 0.0)


# --- length control ---


def test_length_alone_moves_no_score_unless_asked_for() -> None:
    """The chosen answers are longer and hold the same words: with length nearly all pairs are told apart (more than
    95 in 100); without it a judge knows of no reason, and fewer than 75 in 100 go the longer one's way."""
    pairs = longer()
    reward = reward_of(pairs[:80])
    unseen = as_sides(pairs[80:])
    with_length = reward.scores(unseen.chosen, length=True) - reward.scores(unseen.rejected, length=True)
    without = reward.scores(unseen.chosen) - reward.scores(unseen.rejected)
    assert credit(with_length).mean() > 0.95
    assert credit(without).mean() < 0.75
    assert reward.slope > 0


def test_score_without_length_is_the_other_less_the_slope() -> None:
    """T' s' − T s = slope · ln(1 + characters), by definition; "abcd" has 4."""
    reward = reward_of(longer(40))
    texts = [("q", " abcd\n")]
    apart = reward.scores(texts, length=True) * reward.temperature_length - reward.scores(texts) * reward.temperature
    assert apart[0] == pytest.approx(reward.slope * math.log(5))


# --- saved and read again ---


@pytest.mark.parametrize("letters", [False, True])
def test_saved_reward_scores_as_the_fitted_one(tmp_path: Path, letters: bool) -> None:
    pairs = polite()
    reward = reward_of(pairs, letters=letters)
    reward.save(tmp_path / "judge")
    again = load_reward(tmp_path / "judge")
    texts = [*as_sides(pairs).chosen, ("x", ""), ("", "Ünïcödé \x02 ﷽"), ("new words", "never seen before!")]
    for length in (False, True):
        assert np.abs(again.scores(texts, length=length) - reward.scores(texts, length=length)).max() < 1e-12


def test_reward_with_an_encoder_needs_that_encoder(tmp_path: Path, tiny_llama: Path) -> None:
    pairs = polite(20)
    reward = reward_of(pairs, encoder=Encoder(str(tiny_llama), keep=True))
    reward.save(tmp_path / "judge")
    judge = BradleyTerryJudge(str(tmp_path / "judge"), encoder=str(tiny_llama))
    texts = as_sides(pairs).chosen
    assert np.abs(judge.reward.scores(texts) - reward.scores(texts)).max() < 1e-5  # float32, other padding
    assert judge.reward.weights.size == reward.features.matrix(texts[:1]).shape[1]
    with pytest.raises(JudgeError, match="fitted with an encoder: name its folder as 'encoder'"):
        BradleyTerryJudge(str(tmp_path / "judge"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(JudgeError, match="another encoder"):
        BradleyTerryJudge(str(tmp_path / "judge"), encoder=str(tmp_path / "other"))
    with pytest.raises(JudgeError, match="not a folder with a Hugging Face model"):
        BradleyTerryJudge(str(tmp_path / "judge"), encoder=str(tmp_path / "none"))


def test_encoder_is_the_mean_over_each_text_alone(tiny_llama: Path) -> None:
    """A text's embedding has length 1 and does not depend on the longer text beside it, so padding is left out."""
    encoder = Encoder(str(tiny_llama))
    texts = [("hi", "short"), ("hi", "a much longer answer than the other one")]
    both = encoder.embed(texts)
    assert np.abs(both - np.concatenate([encoder.embed([one]) for one in texts])).max() < 1e-5
    assert np.linalg.norm(both, axis=1) == pytest.approx([1.0, 1.0])
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_folder_holds_json_safetensors_and_a_page(fitted: Path) -> None:
    names = {"bradley_terry.json", "bradley_terry.safetensors", "card.json", "README.md"}
    assert {file.name for file in fitted.iterdir()} == names


def rewrite(folder: Path, **changes: object) -> None:
    file = folder / "bradley_terry.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def reweigh(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = folder / "bradley_terry.safetensors"
    save_file(load_file(file) | {"weights": np.ones(1)}, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "bradley_terry.json").unlink(), r"no fitted judge in .* online-dpo judge fit PAIRS"),
        (lambda f: (f / "bradley_terry.json").write_text("{"), "is damaged: JSONDecodeError"),
        (lambda f: (f / "bradley_terry.safetensors").write_bytes(b"no"), "is damaged: SafetensorError"),
        (lambda f: rewrite(f, format=9), "format 9, this version reads 1: fit it again"),
        (lambda f: rewrite(f, temperature=-1.0), "is damaged"),
        (lambda f: rewrite(f, slope="steep"), "is damaged: ValueError"),
        (reweigh, r"is damaged: \d+ columns, weights of shape \(1,\)"),
    ],
)
def test_damage_is_said_in_one_line(fitted: Path, tmp_path: Path, change: Any, message: str) -> None:
    for file in fitted.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path)
    with pytest.raises(JudgeError, match=message) as caught:
        BradleyTerryJudge(str(tmp_path))
    assert "\n" not in str(caught.value)


# --- the judge ---


def test_judge_prefers_what_people_preferred(fitted: Path) -> None:
    """Opened as an experiment opens it, on pairs that it has not seen."""
    spec = JudgeSpec.model_validate({"use": "judges.bradley_terry:BradleyTerryJudge", "model": fitted.name})
    judge = open_judge(spec, [fitted.parent]).judge
    assert isinstance(judge, BradleyTerryJudge)
    right = 0
    for pair in polite(20, seed=9):
        prompt, chosen, rejected = as_comparison(pair)
        first, second = judge.score(prompt, [chosen, rejected])
        assert isinstance(first, float)
        assert isinstance(second, float)
        right += first > second
    assert right == 20


def test_score_does_not_depend_on_what_stands_beside_it(fitted: Path) -> None:
    judge = BradleyTerryJudge(str(fitted))
    items = [(prompt, [chosen, rejected]) for prompt, chosen, rejected in map(as_comparison, polite(5, seed=4))]
    together = judge.score_batch(items)
    alone = [[judge.score(prompt, [answer])[0] for answer in answers] for prompt, answers in items]
    assert together == alone
    assert judge.score_batch([]) == []


@settings(max_examples=30)
@given(st.text(st.characters(categories=["L", "N", "P", "Z", "Cc", "Cs", "Co", "So"])))
def test_any_text_gets_a_finite_score(fitted: Path, text: str) -> None:
    judge = BradleyTerryJudge(str(fitted), length=True)
    prompt, chosen, rejected = as_comparison(preference(0, text, text, "please"))
    assert all(isinstance(score, float) and math.isfinite(score) for score in judge.score(prompt, [chosen, rejected]))


def test_length_is_true_or_false(fitted: Path) -> None:
    with pytest.raises(JudgeError, match="length must be true or false, found 'yes'"):
        BradleyTerryJudge(str(fitted), length="yes")  # type: ignore[arg-type]


def test_importing_the_judge_loads_nothing_heavy() -> None:
    modules = "judges.bradley_terry, judges.bradley_terry_fit, online_dpo.commands.judge_fit"
    code = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"sklearn", "scipy", "torch", "transformers", "datasets"} & set(done.stdout.split())


# --- figures ---


def test_figures_by_hand() -> None:
    """Margins ln 3, ln 3, −ln 3, 0 have P(chosen) = ¾, ¾, ¼, ½. Right: (1 + 1 + 0 + ½)/4 = 0.625. Brier:
    (1/16 + 1/16 + 9/16 + 4/16)/4 = 15/64. Log loss: (2 ln 4/3 + ln 4 + ln 2)/4. The longer answer is right on
    (1 + 0 + ½ + 1)/4 = 0.625, so the gain is 0. Lengths and margins both differ in pairs 1 and 2: the judge goes
    with the longer in 1 alone. Folds {1, 2} and {3, 4}: 1 and ¼."""
    three = math.log(3)
    found = figures(np.array([three, three, -three, 0.0]), np.array([5.0, -5.0, 0.0, 2.0]), np.array([1.0, 1, 2, 2]))
    assert found.accuracy.mean == pytest.approx(0.625)
    assert found.brier == pytest.approx(15 / 64)
    assert found.log_loss == pytest.approx((2 * math.log(4 / 3) + math.log(4) + math.log(2)) / 4)
    assert found.gain.mean == pytest.approx(0.0)
    assert found.gain.low < 0 < found.gain.high
    assert found.prefers_longer == pytest.approx(0.5)
    assert found.folds == (1.0, 0.25)
    assert found.over_folds.mean == pytest.approx(0.625)


def test_interval_over_folds_is_students() -> None:
    """0.5 and 0.7: mean 0.6, standard deviation 0.1·√2, so 0.1 the mean's; t(0.975, 1) = 12.706."""
    found = over_folds([0.5, 0.7])
    assert (found.low, found.high) == pytest.approx((0.6 - 1.2706, 0.6 + 1.2706), abs=1e-4)


def test_reliability_bins_by_the_more_likely_answer() -> None:
    """Margins ±ln 3 are ¾ sure (third of five bins from ½), one right of two; ln 19 is 0.95 sure and right; 0 is a
    tie at ½, half right."""
    low, middle, high = reliability(np.array([math.log(3), -math.log(3), math.log(19), 0.0]))
    assert (low.n, low.confidence, low.accuracy) == (1, 0.5, 0.5)
    assert (middle.n, middle.accuracy) == (2, 0.5)
    assert middle.confidence == pytest.approx(0.75)
    assert (high.n, high.accuracy) == (1, 1.0)
    assert high.confidence == pytest.approx(0.95)


# --- fitting ---


def test_card_tells_what_the_judge_can_do(tmp_path: Path) -> None:
    steps: list[int] = []
    card = fit(polite(), tmp_path / "judge", folds=3, letters=False, source="polite.jsonl", advance=steps.append)
    assert card.controlled.accuracy.mean == 1.0
    assert card.controlled.brier < 0.05
    assert "Without length, the judge beats 'the longer answer wins'." in card.verdict
    assert (card.pairs, card.prompts, len(card.controlled.folds), steps) == (60, 60, 3, [1] * 4)
    assert json.loads((tmp_path / "judge" / "card.json").read_text()) == card.as_dict()
    page = (tmp_path / "judge" / "README.md").read_text()
    assert card.verdict in page
    assert "1.000 [" in page


def test_card_says_so_where_the_judge_knows_only_length(tmp_path: Path) -> None:
    card = fit(longer(), tmp_path / "judge", folds=3, letters=False)
    assert card.longer_wins.mean == pytest.approx(1.0, abs=0.03)
    assert "Without length, the judge is worse than 'the longer answer wins'" in card.verdict
    assert card.with_length.gain.high <= 0.03


def test_pairs_of_one_prompt_are_never_on_both_sides(tmp_path: Path) -> None:
    """Each prompt's pair comes three times, and a coin has chosen. A judge that has seen a pair knows it (its words
    are its own); one that has not can only guess, so held-out accuracy is near one half, not near 1."""
    draw = random.Random(5)
    pairs = []
    for prompt in range(60):
        answers = [f"w{prompt}x{side} v{prompt}x{side} {words(draw, 4)}" for side in range(2)]
        draw.shuffle(answers)
        pairs += [preference(3 * prompt + copy, f"question {prompt}", *answers) for copy in range(3)]
    card = fit(pairs, tmp_path / "judge", folds=5, min_df=1, letters=False, c=10.0)
    assert (card.pairs, card.prompts) == (180, 60)
    assert card.controlled.accuracy.mean < 0.75


def test_same_seed_gives_the_same_judge(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fit(polite(30), tmp_path / name, folds=2, letters=False)
    for file in ("bradley_terry.json", "bradley_terry.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_strength_is_chosen_by_log_loss_held_out_inside() -> None:
    """Where a word decides every pair a weak penalty is best; where a coin decides, the strongest there is."""
    draw = random.Random(2)
    coin = [preference(i, f"question {i}", words(draw, 6), words(draw, 6)) for i in range(200)]
    strengths = [
        train(as_sides(pairs), Recipe(min_df=1, letters=False, encoder=None, c=None, seed=0))[1]
        for pairs in (polite(), coin)
    ]
    assert strengths == [max(bradley_terry_fit.STRENGTHS), min(bradley_terry_fit.STRENGTHS)]


def test_folder_with_other_files_is_left_alone(tmp_path: Path, fitted: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(JudgeError, match=r"holds other files than a fitted judge's \(notes.txt\): name a new folder"):
        fit(polite(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(JudgeError, match="is a file; name a folder"):
        fit(polite(), tmp_path / "notes.txt")


def test_former_fit_is_replaced(tmp_path: Path) -> None:
    fit(polite(), tmp_path / "judge", folds=2, letters=False, source="first")
    fit(polite(30), tmp_path / "judge", folds=2, letters=False, source="second")
    assert json.loads((tmp_path / "judge" / "card.json").read_text())["source"] == "second"
    load_reward(tmp_path / "judge")


@pytest.mark.parametrize(
    ("pairs", "options", "error", "message"),
    [
        (9, {}, DataError, "9 different prompts; 5 folds need at least 10"),
        (20, {"folds": 12}, DataError, "12 folds need at least 24"),
        (20, {"folds": 1}, JudgeError, "folds must be at least 2"),
        (20, {"c": 0.0}, JudgeError, "c must be above 0"),
        (20, {"min_df": 0}, JudgeError, "min_df must be at least 1"),
        (20, {"min_df": 1000}, DataError, "no term is in 1000 answers .* lower min_df"),
    ],
)
def test_what_cannot_be_fitted_is_said_in_one_line(
    tmp_path: Path, pairs: int, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(polite(pairs), tmp_path / "judge", letters=False, **options)
    assert not (tmp_path / "judge").exists()


# --- the command ---


def command(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(judge_fit)
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def polite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    rows = [{"prompt": p.messages[0].content, "chosen": p.chosen, "rejected": p.rejected} for p in polite()]
    rows.append({"prompt": "same", "chosen": "x", "rejected": "x"})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_command_fits_and_prints_the_card(polite_file: Path, tmp_path: Path) -> None:
    done = command(str(polite_file), "-o", str(tmp_path / "judge"), "--folds", "2", "--no-letters", "--quiet")
    assert done.exit_code == 0, done.output
    assert "pairs.jsonl: pairs held out in 2 folds" in done.output
    assert "1.000 [" in done.output
    assert "Without length, the judge beats 'the longer answer wins'." in done.output
    assert "1 identical" in done.output
    load_reward(tmp_path / "judge")


def test_command_says_what_is_wrong_in_one_line(polite_file: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "judge")), "no preference pairs at"),
        ((str(polite_file), "-o", str(tmp_path)), "holds other files than a fitted judge's"),
        ((str(polite_file), "-o", str(tmp_path / "judge"), "--limit", "5"), "5 different prompts"),
        ((str(polite_file), "-o", str(tmp_path / "judge"), "--encoder", "nowhere"), "encoder 'nowhere'"),
    ):
        done = command(*arguments, "--quiet")
        assert done.exit_code == 2
        [line] = done.stderr.splitlines()
        assert line.startswith("online-dpo: ")
        assert message in line


# --- real data ---


@pytest.mark.slow
def test_real_summaries_are_told_apart(tmp_path: Path) -> None:
    """People's choices between summaries: better than chance by far without length, calibrated, and with length
    never worse than length alone. Accuracy alone would be reached by a judge of length."""
    if not TLDR.is_file():
        pytest.skip("the human comparisons (../shared/data/pairs) are not on this machine")
    card = fit(load_preferences(str(TLDR)).pairs, tmp_path / "judge")
    assert card.controlled.accuracy.low > 0.55
    assert card.controlled.log_loss < 0.67
    assert card.with_length.gain.high > 0
    for one in card.with_length.reliability:
        assert abs(one.accuracy - one.confidence) < 0.05 + 2 * math.sqrt(0.25 / one.n)
