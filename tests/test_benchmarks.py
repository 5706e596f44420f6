"""What the benchmarks print and count: the figures themselves are measured, not tested."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from figures import Report, compare  # noqa: E402 - after the path
from flops import Shape, plain_tokens, step_flops  # noqa: E402
from turns import Contender  # noqa: E402


def test_a_ratio_above_one_is_better_whichever_way_the_unit_goes() -> None:
    """Medians 2 and 6: in seconds ours is 3 times better, in tokens a second it is a third as good."""
    ours, theirs = [1.0, 2.0, 50.0], [6.0, 6.0, 7.0, 0.0]
    assert compare("f", ours, theirs, "s", "less").ratio == 3.0
    assert compare("f", ours, theirs, "tokens/s", "more").ratio == 0.3333
    assert compare("f", ours, theirs, "s", "less").runs == 3


def test_a_figure_is_one_json_line_of_the_six_keys(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.add("step, prompts of 40 tokens", [2.0], [4.0], "s", "less")
    report.add("alone", [1.0], [], "MiB", "less")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {
        "figure": "step, prompts of 40 tokens",
        "ours": 2.0,
        "theirs": 4.0,
        "ratio": 2.0,
        "unit": "s",
        "runs": 1,
    }
    assert lines[1]["theirs"] is None
    assert lines[1]["ratio"] is None
    assert report.table().splitlines()[-1] == "| alone | 1 | not measured | not measured | MiB | 1 |"


def test_a_figure_that_nobody_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        compare("f", [], [], "s", "less")


def test_operations_of_a_step_by_hand() -> None:
    """One layer of 10 weights, hidden 2, attention 3 wide, vocabulary 5; prompt 3, completions 1 and 2.

    Shared prompt: 6 tokens, 6·10·6 = 360 in the layer. Keys seen: the prompt's 1 + 2 + 3 = 6; the first completion 3 of
    the prompt and itself, 4; the second 4 and 5, 9; 19 in all, 12·3·19 = 684. Head: 3 tokens, 6·2·5·3 = 180. Together
    1224. As two sequences of 4 and 5: 9 tokens, 540; keys 10 + 15 = 25, 900; the same head: 1620.
    """
    shape = Shape(layers=1, layer_weights=10, hidden=2, attention_width=3, vocabulary=5)
    assert step_flops(shape, [(3, 1, 2)], shared_prompt=True) == 1224
    assert step_flops(shape, [(3, 1, 2)], shared_prompt=False) == 1620
    assert plain_tokens([(3, 1, 2), (1, 1, 1)]) == 9 + 4


def test_contenders_speak_in_turn_whatever_their_libraries_print(tmp_path: Path) -> None:
    """What a contender prints goes to its log, not between its JSON lines; it starts nothing before its turn."""
    script = tmp_path / "counting.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport turns\n"
        "def work(options):\n"
        "    for number in range(options['turns']):\n"
        "        print('a library talks')\n"
        "        yield {'number': number}\n"
        "turns.serve(work(turns.options()))\n"
    )
    with Contender("one", str(script), {"turns": 2}) as one, Contender("other", str(script), {"turns": 2}) as other:
        said = [contender.turn()["number"] for contender in (one, other, one, other)]
    assert said == [0, 0, 1, 1]


def test_a_contender_that_ends_is_an_error_with_its_own_words(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text("raise SystemExit('no model of this name')\n")
    with Contender("failing", str(script), {}) as contender, pytest.raises(RuntimeError, match="no model of this name"):
        contender.turn()
