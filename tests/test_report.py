"""The report of real (small) run folders: what is in it, what it leaves out where a run has less, and that text stays
text."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_parts import HOSTILE, run_of_two_arms, with_hostile_answers
from typer.testing import CliRunner

from online_dpo.cli import app
from online_dpo.display import clean
from online_dpo.report.answers import collect_answers, readable
from online_dpo.report.data import read_runs
from online_dpo.report.reporting import report_runs
from online_dpo.store import RunStore

VOID = {"meta", "link", "input", "img", "br", "hr", "path", "use", "rect", "line", "circle"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two arms and two seeds with hostile answers, and its report beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        root = tmp_path_factory.mktemp("runs") / "two"
        with_hostile_answers(run_of_two_arms(root))
        report_runs([root], root / "report")
    return root


class Page(HTMLParser):
    """A page as its elements: (tag, attributes) in order, text by heading, and whether all are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(made: Path) -> Page:
    return Page((made / "report" / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(made: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made / "report" / "report.json").read_text(encoding="utf-8"))
    return found


def tables(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {table["name"]: table["rows"] for section in data["sections"] for table in section["tables"]}


# --- what is in it ---


def test_sections_stand_in_the_order_of_reading(page: Page, data: dict[str, Any]) -> None:
    wanted = ["compared", "verdict", "warnings", "frontier", "wins", "curves", "off_policy", "displacement", "lengths"]
    wanted += ["judges", "prices", "league", "answers", "reproduce"]
    assert [one["id"] for one in page.of("section") if one.get("id")] == wanted
    assert [section["name"] for section in data["sections"]] == wanted


def test_the_verdict_and_every_warning_are_on_the_page(page: Page, data: dict[str, Any]) -> None:
    text = " ".join(page.text)
    assert data["verdict"] in text
    assert data["comparison"]["warnings"]
    assert all(warning in text for warning in data["comparison"]["warnings"])


def test_figures_of_the_tables_are_those_of_the_run(made: Path, data: dict[str, Any]) -> None:
    """Budgets by hand from metrics.json: means over the two seeds of sums over the two rounds."""
    metrics = [
        [json.loads((made / f"arms/on_policy/seed_{s}/round_0{r}/metrics.json").read_text()) for r in (1, 2)]
        for s in (0, 1)
    ]
    row = next(row for row in tables(data)["budgets"] if row["arm"] == "on_policy")
    assert row["pairs"] == sum(one["pairs"]["kept"] for seed in metrics for one in seed) / 2
    assert row["tokens sampled"] == sum(one["sample"]["tokens"] for seed in metrics for one in seed) / 2
    drawn = [seed[1]["off_policy"]["displacement"]["chosen"]["mean"] for seed in metrics]
    shown = next(row for row in tables(data)["displacement"] if (row["arm"], row["round"]) == ("on_policy", 2))
    assert shown["chosen"]["mean"] == pytest.approx(sum(drawn) / 2)
    assert (shown["chosen"]["low"], shown["chosen"]["high"]) == pytest.approx((min(drawn), max(drawn)))


def test_work_taken_over_from_another_arm_counts_in_full(made: Path, data: dict[str, Any]) -> None:
    """Round 1 of both arms is one computation. By hand: the seconds of each stage's record, or of the one it was taken
    from, over both seeds; with what taking over took instead the sum would be another."""
    own, full = 0.0, 0.0
    for file in made.glob("arms/self_offline/seed_*/round_*/stages/*.json"):
        record = json.loads(file.read_text())
        own += record["seconds"]
        if record["reused_from"] is not None:
            record = json.loads((made / record["reused_from"] / "stages" / file.name).read_text())
            assert record["reused_from"] is None
        full += record["seconds"]
    budgets = {row["arm"]: row for row in tables(data)["budgets"]}
    assert budgets["self_offline"]["seconds"] == pytest.approx(full / 2)
    assert budgets["self_offline"]["seconds"] != pytest.approx(own / 2)


def test_settings_in_which_arms_differ_are_listed_and_no_others(data: dict[str, Any]) -> None:
    found = tables(data)["differences"]
    assert found == [{"key": "source", "on_policy": "current", "self_offline": "initial"}]


def test_the_same_tables_are_in_html_markdown_and_json(made: Path, page: Page, data: dict[str, Any]) -> None:
    captions = {table["caption"] for section in data["sections"] for table in section["tables"]}
    markdown = (made / "report" / "report.md").read_text(encoding="utf-8")
    assert len(page.of("table")) == len(captions) == len(re.findall(r"^\*\*(?!Commands|experiment)", markdown, re.M))
    assert len(tables(data)) == len(page.of("table"))


def test_figures_lie_beside_the_page_as_png_and_svg(made: Path, data: dict[str, Any]) -> None:
    names = {name for section in data["sections"] for name in section["figures"]}
    assert {"frontier_reward", "frontier_gold", "win_matrix", "curve_kl", "off_policy_ess", "league", "cost"} <= names
    files = {path.name for path in (made / "report" / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    markdown = (made / "report" / "report.md").read_text(encoding="utf-8")
    assert all(f"](figures/{name}.png)" in markdown for name in names)


def test_the_resolved_experiment_is_on_the_page_and_the_machine_is_not(made: Path, page: Page) -> None:
    text = "".join(page.text)
    assert "judge_timeout: null" in text
    assert "online-dpo run experiment.yaml" in text
    assert str(made.parent) not in (made / "report" / "report.html").read_text(encoding="utf-8")


# --- accessible, and by itself ---


def test_every_table_figure_and_control_has_a_name(page: Page) -> None:
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(one.get("scope") in ("col", "row") for one in page.of("th"))
    named = {one["for"] for one in page.of("label")}
    controls = [one["id"] for tag in ("select", "input") for one in page.of(tag)]
    assert set(controls) == named
    pictures = [one for one in page.of("div") if one.get("class") == "plot"]
    assert pictures
    assert all(one["role"] == "img" and len(one["aria-label"] or "") > 40 for one in pictures)
    assert [tag for tag in ("header", "nav", "main", "footer") if len(page.of(tag)) == 1] == [
        "header", "nav", "main", "footer",
    ]  # fmt: skip
    assert page.open == [], "an element is not closed"


def test_headings_go_down_one_level_at_a_time(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_ids_are_unique_and_links_lead_to_them(page: Page) -> None:
    ids = [one["id"] for _, one in page.elements if "id" in one]
    assert len(ids) == len(set(ids))
    links = [one[key] for _, one in page.elements for key in ("href", "xlink:href") if key in one]
    assert all(link == "data:," or (link or "").removeprefix("#") in ids for link in links)


def test_nothing_on_the_page_points_outside(page: Page) -> None:
    """Names of namespaces are no requests; there is no other address, and the page's own policy allows none."""
    for tag, attributes in page.elements:
        for key, value in attributes.items():
            if key.startswith("xmlns"):
                continue
            assert not re.search(r"https?:|//|url\((?!#)|@import", value or ""), (tag, key, value)
    [policy] = [one["content"] or "" for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy


# --- hostile text ---


def test_answers_are_data_and_never_markup(made: Path, page: Page) -> None:
    """Two scripts, the data and ours, whatever the answers hold; no element or handler of theirs is on the page."""
    assert [one.get("type") for one in page.of("script")] == ["application/json", None]
    assert not page.of("img")
    assert not [key for _, one in page.elements for key in one if key.startswith("on")]
    block = page.scripts[0]
    assert not set("<>&\u2028\u2029") & set(block)
    stored = json.loads(block)
    texts = {text for one in stored["sets"] for text in one["text"]}
    assert {readable(text) for text in HOSTILE} == texts


def test_reasons_of_abstentions_are_data_too(page: Page) -> None:
    stored = json.loads(page.scripts[0])
    assert all(one["abstained"][1] == clean(HOSTILE[1]) for one in stored["sets"])
    assert all(one["reward"][1] is None for one in stored["sets"])


def test_control_characters_are_gone_and_lines_stay() -> None:
    assert readable("a\x1b[31mb\x00\u202ec\n\n  d\te\r\nf\u2028g\n") == "abc\n\n  d    e\nf\ng"


def test_markdown_takes_no_markup_from_a_name(made: Path) -> None:
    from online_dpo.display.markdown import escaped

    assert escaped("a|b *c* [d](e) <f>\n`g`") == "a\\|b \\*c\\* \\[d\\](e) \\<f\\> \\`g\\`"


def test_a_fence_is_longer_than_any_in_the_listing() -> None:
    from online_dpo.report.document import Listing, Report, Section
    from online_dpo.report.markdown import as_markdown

    text = as_markdown(Report("t", "s", "v", (Section("x", "X", listings=(Listing("l", "a\n````\nb"),)),), {}), "f")
    assert "\n`````\na\n````\nb\n`````" in text


# --- the answers ---


def test_policies_that_rounds_share_are_stored_once(made: Path) -> None:
    """12 closed rounds; round 0 and round 1 of both arms are one policy a seed: 4 sets less."""
    answers = collect_answers(read_runs([RunStore.open(made)]))
    assert len(answers["columns"]) == 12
    # The hostile answers were written arm by arm into equal files.
    assert len(answers["sets"]) == 8
    first = {(one["arm"], one["seed"]): one["set"] for one in answers["columns"] if one["round"] == 0}
    assert first["on_policy", 0] == first["self_offline", 0] != first["on_policy", 1]


def test_prompts_are_left_out_where_answers_would_be_too_many(made: Path) -> None:
    answers = collect_answers(read_runs([RunStore.open(made)]), most=8 * 5 + 3)
    assert (len(answers["prompts"]), answers["left_out"]) == (5, 7)
    assert all(len(one["text"]) == 5 for one in answers["sets"])


# --- runs that have less ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "absent", "present"),
    [
        ({"seeds": [0], "evaluation": {"off_policy": 0}},
         {"frontier_gold", "curve_gold", "off_policy_ess", "displacement_chosen", "judge_length"}, {"frontier_reward"}),
        ({"seeds": [0], "arms": {"only": {}}, "audit": {"prompts": 4}},
         set(), {"curve_reward", "win_matrix", "frontier_gold", "judge_length"}),
        ({"seeds": [0], "evaluation": {"temperature": 0.7}}, {"frontier_reward", "curve_kl"}, {"curve_reward"}),
    ],
    ids=["no gold, no audit, nothing off-policy", "one arm, one seed", "no KL"],
)  # fmt: skip
def test_a_run_that_has_less_has_a_shorter_report(
    changes: dict[str, Any], absent: set[str], present: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    run_of_two_arms(tmp_path / "run", **changes)
    report_runs([tmp_path / "run"], tmp_path / "out")
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    figures = {name for section in found["sections"] for name in section["figures"]}
    assert not figures & absent
    assert present <= figures
    assert Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).open == []


@pytest.mark.slow
def test_several_runs_are_told_apart_and_an_unfinished_one_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for name in ("one", "two"):
        run_of_two_arms(tmp_path / name, seeds=[0])
    (tmp_path / "two/arms/self_offline/seed_0/round_02/metrics.json").unlink()
    done = CliRunner().invoke(
        app, ["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "r")]
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "r" / "report.json").read_text(encoding="utf-8"))
    arms = [row["arm"] for row in tables(found)["arms"]]
    assert arms == ["one/on_policy", "one/self_offline", "two/on_policy", "two/self_offline"]
    warnings = next(section for section in found["sections"] if section["name"] == "warnings")["items"]
    assert "two/self_offline, seed 0: 1 of 2 rounds are closed" in warnings
    assert found["verdict"] in " ".join(done.output.split())


@pytest.mark.parametrize("arguments", [["missing"], []])
def test_a_folder_that_is_no_run_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", *(str(tmp_path / one) for one in arguments)])
    assert done.exit_code == 2
    assert "Traceback" not in done.output
