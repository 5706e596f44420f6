"""What a person sees of a run: progress while it works, tables of its figures, answers before and after.

Everything that a model, a judge or a file wrote is hostile here: it passes through `clean` and is put into
`rich.text.Text`, so that neither control sequences nor rich's markup in it reach the terminal as commands.
"""

from __future__ import annotations

import io
import math
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

WIDTH = 100
"""Columns of output that is no terminal; all tables fit."""

ABSENT = "–"
PLAIN_SECONDS = 10.0
"""At most one progress line in this time where there is no terminal."""

STAGES = ("reference", "sample", "judge", "audit", "pair", "train", "evaluate")
PART_OF = {"judge": "audit", "train": "reference"}
"""Stages whose seconds are shown with another's: columns for them would be more than fit."""
SHOWN_CHARACTERS = 1200

# CSI (colours, cursor), OSC and the other string sequences (titles, links, clipboard), then two-character escapes.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90\x98\x9c-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
_KEPT = "\n\u200c\u200d"
"""The line break, and two format characters that scripts and emoji need; the others can reorder or hide text."""


def clean(text: object, *, lines: bool = False) -> str:
    """`text` without escape sequences and control, format or surrogate characters.

    Tabs become spaces; so do line breaks, unless `lines` keeps them (several in a row as one).
    """
    unified = re.sub(r"\r\n?|[\v\f\x85\u2028\u2029]", "\n", _ESCAPES.sub("", str(text)))
    unified = re.sub(r"\n\s*", "\n" if lines else " ", unified.replace("\t", " ")).strip()
    return "".join(char for char in unified if char in _KEPT or unicodedata.category(char) not in ("Cc", "Cf", "Cs"))


def make_console(*, stderr: bool = False) -> Console:
    """The console of the command line: 100 columns where it is no terminal, and no crash on a narrow encoding."""
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, width=WIDTH)
    return console


# --- progress ---


@dataclass(slots=True)
class _Stage:
    """The stage under way."""

    label: str
    total: int
    unit: str
    began: float
    done: int = 0
    note: str = ""

    def line(self, now: float, *, finished: bool) -> str:
        """How far it is, at what rate, and how long it took or will take."""
        seconds = now - self.began
        rate = self.done / seconds if seconds > 0 else 0.0
        parts = [f"{self.done} {self.unit}" if finished and self.done == self.total else self._count()]
        if finished:
            parts[0] += f" in {seconds:.1f} s"
        if rate > 0:
            parts.append(f"{rate:.{1 if rate >= 1 else 3}f}/s")
            if not finished:
                parts.append(f"{_clock((self.total - self.done) / rate)} left")
        if self.note:
            parts.append(self.note)
        return f"{self.label}: {', '.join(parts)}"

    def _count(self) -> str:
        return f"{self.done} of {self.total} {self.unit}"


class QuietProgress:
    """Says nothing. The other two build on it; all are context managers, which stop the display on an error."""

    def start(self, label: str, total: int, unit: str) -> None:
        """A stage of `total` units begins."""

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more units of the current stage are done."""

    def finish(self) -> None:
        """The current stage is done."""

    def say(self, line: str) -> None:
        """One line for the person who watches."""

    def close(self) -> None:
        """Stop showing anything; a stage that is under way was interrupted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PlainProgress(QuietProgress):
    """Lines for output that is no terminal: one about every ten seconds, and one when a stage is done."""

    def __init__(
        self, console: Console, every: float = PLAIN_SECONDS, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._console = console
        self._every = every
        self._clock = clock
        self._stage: _Stage | None = None
        self._printed = 0.0

    def start(self, label: str, total: int, unit: str) -> None:
        """A stage of `total` units begins."""
        self._printed = self._clock()
        self._stage = _Stage(clean(label), total, clean(unit), self._printed)

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more units of the current stage are done."""
        stage = self._stage
        if stage is None:
            return
        stage.done += amount
        stage.note = clean(note) or stage.note
        now = self._clock()
        if stage.done < stage.total and now - self._printed >= self._every:
            self._printed = now
            self.say(stage.line(now, finished=False))

    def finish(self) -> None:
        """The current stage is done: its line, with rate and seconds."""
        if self._stage is not None:
            self.say(self._stage.line(self._clock(), finished=True))
        self._stage = None

    def say(self, line: str) -> None:
        """One line for the person who watches."""
        self._console.print(Text(clean(line)), soft_wrap=True)

    def close(self) -> None:
        """A stage that is under way was interrupted: no line of success for it."""
        self._stage = None


class _Rate(ProgressColumn):
    """Units a second, over the last half minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.{1 if speed >= 1 else 3}f}/s" if speed else "")


class RichProgress(PlainProgress):
    """A bar with count, rate and time left on a terminal; the line of a finished stage stays."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, every=float("inf"))
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def start(self, label: str, total: int, unit: str) -> None:
        """A stage of `total` units begins: a bar appears."""
        self.close()
        super().start(label, total, unit)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}", markup=False),
            _Rate(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(clean(label), total=total, unit=clean(unit), note="")
        self._bar.start()

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more units of the current stage are done."""
        super().advance(amount, note)
        if self._bar is not None and self._stage is not None:
            self._bar.update(self._task, advance=amount, note=self._stage.note)

    def finish(self) -> None:
        """The current stage is done: its bar becomes a line."""
        self._stop()
        super().finish()

    def close(self) -> None:
        """Take the bar away; the terminal is left as it was."""
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


def make_progress(quiet: bool, console: Console) -> QuietProgress:
    """The display that fits: nothing, a bar on a terminal, or lines."""
    if quiet:
        return QuietProgress()
    return RichProgress(console) if console.is_terminal else PlainProgress(console)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


# --- figures as text ---


def number(value: object, *, places: int | None = None, sign: bool = False) -> str:
    """A figure; a dash when it is absent or not finite. Without `places`, as many as its size asks for."""
    found = _finite(value)
    if found is None:
        return ABSENT
    if places is None:
        places = 0 if isinstance(value, int) else _places(abs(found))
    # Adding 0.0 to what was rounded turns -0.0 into 0.0.
    return f"{round(found, places) + 0.0:{'+' if sign else ''}.{places}f}"


def interval(value: object, *, sign: bool = False, places: int | None = None) -> str:
    """`mean [low, high]` of a `{mean, low, high}` mapping, all with the same number of places."""
    mean, low, high = _bounds(value)
    if mean is None:
        return ABSENT
    if places is None:
        places = _places(max(abs(bound) for bound in (mean, low, high) if bound is not None))
    text = number(mean, places=places, sign=sign)
    if low is None or high is None:
        return text
    return f"{text} [{number(low, places=places, sign=sign)}, {number(high, places=places, sign=sign)}]"


def share(value: object) -> str:
    """A share, with its interval where it has one, in per cent: `61 % [52, 70]`."""
    mean, low, high = _bounds(value if isinstance(value, Mapping) else {"mean": value})
    if mean is None:
        return ABSENT
    return (
        f"{100 * mean:.0f} %"
        if low is None or high is None
        else f"{100 * mean:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
    )


def _finite(value: object) -> float | None:
    """`value` as a float; None when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _bounds(value: object) -> tuple[float | None, float | None, float | None]:
    """Mean, low and high of a mapping of these; None for what is absent."""
    if not isinstance(value, Mapping):
        return None, None, None
    return _finite(value.get("mean")), _finite(value.get("low")), _finite(value.get("high"))


def _places(size: float) -> int:
    """Decimal places that show three or four digits of a number of this size."""
    for least, places in ((1000.0, 0), (100.0, 1), (10.0, 2), (0.01, 3)):
        if size >= least:
            return places
    return 5 if size else 3


def _get(row: Mapping[str, Any], *keys: str) -> Any:
    """The value at a path of keys, None when any is absent."""
    value: Any = row
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


# --- tables ---


def _spaced(*tables: Table) -> Group:
    """Tables with an empty line after each."""
    return Group(*(part for table in tables for part in (table, Text())))


_Column = tuple[str, Callable[[Mapping[str, Any]], str]]
_Rows = Sequence[Mapping[str, Any]]


def round_table(metrics: _Rows) -> Group:
    """Three tables of all arms, seeds and rounds: what the judge says, how far the policy has gone for it, and what
    its answers look like."""
    reward: list[_Column] = [
        ("reward", lambda row: interval(_get(row, "held_out", "reward"))),
        ("change", lambda row: interval(_get(row, "held_out", "reward_change"), sign=True)),
        ("win rate", lambda row: share(_get(row, "held_out", "win_rate"))),
    ]
    drift: list[_Column] = [
        ("KL to initial", lambda row: interval(_get(row, "held_out", "kl_initial"))),
        ("a token", lambda row: number(_mean(_get(row, "held_out", "kl_initial_token")))),
        ("to reference", lambda row: interval(_get(row, "held_out", "kl_reference"))),
    ]
    answers: list[_Column] = [
        ("length", lambda row: number(_mean(_get(row, "held_out", "length")), places=1)),
        ("ended", lambda row: share(_mean(_get(row, "held_out", "ended")))),
        ("distinct-2", lambda row: number(_mean(_get(row, "held_out", "distinct_2")), places=3)),
        ("abstained", lambda row: number(_get(row, "held_out", "abstained"))),
    ]
    count = max((_get(row, "held_out", "n") or 0 for row in metrics), default=0)
    return _spaced(
        _table(
            f"Held-out reward ({number(count)} prompts; change and win rate against the initial policy)",
            metrics,
            reward,
            "in brackets: 95 % intervals over prompts, of this seed alone",
        ),
        _table("KL from the initial policy and from the round's reference (nats a sequence)", metrics, drift),
        _table("Held-out answers (length in tokens)", metrics, answers),
    )


def stage_table(metrics: _Rows) -> Group:
    """Three tables of the trained rounds: pairs, training, and speed with the seconds of every stage."""
    trained = [row for row in metrics if _get(row, "round") != 0]
    pairs: list[_Column] = [
        ("answers", lambda row: number(_get(row, "sample", "candidates"))),
        ("abstained", lambda row: number(_get(row, "judge", "abstained"))),
        ("pairs", lambda row: number(_get(row, "pairs", "kept"))),
        ("margin", lambda row: number(_get(row, "pairs", "margin"))),
        ("dropped", lambda row: _counts(_get(row, "pairs", "dropped"))),
    ]
    training: list[_Column] = [
        ("steps", lambda row: number(_get(row, "train", "steps"))),
        ("loss", _losses),
        ("accuracy", lambda row: share(_get(row, "train", "accuracy_last"))),
        ("chosen", lambda row: number(_get(row, "train", "chosen_logp_change"), places=2, sign=True)),
        ("rejected", lambda row: number(_get(row, "train", "rejected_logp_change"), places=2, sign=True)),
        ("reference", lambda row: clean(_get(row, "train", "reference_from") or ABSENT)),
        ("engine gap", lambda row: _scientific(_get(row, "train", "engine_gap_token"))),
    ]
    speed: list[_Column] = [
        ("sampling", lambda row: number(_get(row, "sample", "tokens_per_second"), places=0)),
        ("training", lambda row: number(_get(row, "train", "tokens_per_second"), places=0)),
        *((f"{stage} s", _seconds_of(stage)) for stage in STAGES if stage not in PART_OF.values()),
    ]
    reused = any(row.get("reused") for row in metrics)
    return _spaced(
        _table("Pairs", trained, pairs),
        _table(
            "Training (last step: accuracy, change of the log-probs of chosen and rejected)",
            trained,
            training,
            "engine gap: largest difference between engine and learner, nats a token",
        ),
        _table(
            "Speed (sampling and training in tokens/s)",
            metrics,
            speed,
            "* taken over from an identical stage of another arm" if reused else None,
        ),
    )


def judge_table(metrics: _Rows) -> Group:
    """What was measured of the judge itself in each round, on a sample of its prompts; empty where nothing was."""
    audited = [row for row in metrics if _get(row, "audit") is not None]
    if not audited:
        return Group()
    columns: list[_Column] = [
        ("prompts", lambda row: number(_get(row, "audit", "prompts"))),
        ("ties", lambda row: share(_get(row, "audit", "ties", "mean"))),
        ("flips", lambda row: share(_get(row, "audit", "flips"))),
        ("cycles", lambda row: share(_get(row, "audit", "intransitive", "mean"))),
        ("with length", lambda row: interval(_get(row, "audit", "length_correlation"), places=2)),
        ("longest first", _longest_first),
        ("κ", lambda row: number(_get(row, "audit", "kappa", "mean"), places=2)),
    ]
    note = (
        "flips: verdicts that went with the place; with length: rank correlation of score and length within prompts; "
        "longest first: how often, and by chance"
    )
    return _spaced(_table("The judge", audited, columns, note))


def _longest_first(row: Mapping[str, Any]) -> str:
    found = share(_get(row, "audit", "longest_first", "mean"))
    chance = share(_get(row, "audit", "longest_first_by_chance"))
    return found if found == ABSENT else f"{found} ({chance})"


def budget_table(metrics: _Rows) -> Group:
    """What each arm spent over all its rounds: arms that differ here differ in more than what is studied."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in metrics:
        groups.setdefault((row.get("arm", ""), row.get("seed", 0)), []).append(row)
    sums = [
        {
            "arm": arm,
            "seed": seed,
            "rounds": sum(row.get("round") != 0 for row in rows),
            "answers": _total(rows, ("sample", "candidates")),
            "sampled": _total(rows, ("sample", "tokens")),
            "judged": _total(rows, ("judge", "verdicts"), ("judge", "abstained")),
            "pairs": _total(rows, ("pairs", "kept")),
            "steps": _total(rows, ("train", "steps")),
            "trained": _total(rows, ("train", "tokens")),
            "seconds": _total(rows, *(("seconds", stage) for stage in STAGES)),
        }
        for (arm, seed), rows in groups.items()
    ]
    columns: list[_Column] = [
        ("rounds", lambda row: number(row["rounds"])),
        ("answers", lambda row: number(row["answers"], places=0)),
        ("tokens sampled", lambda row: number(row["sampled"], places=0)),
        ("judged", lambda row: number(row["judged"], places=0)),
        ("pairs", lambda row: number(row["pairs"], places=0)),
        ("steps", lambda row: number(row["steps"], places=0)),
        ("tokens trained", lambda row: number(row["trained"], places=0)),
        ("seconds", lambda row: number(row["seconds"], places=0)),
    ]
    return _spaced(_table("Budget (all rounds)", sums, columns, _objectives(metrics), round_column=False))


def _objectives(metrics: _Rows) -> str | None:
    """Each loss that was minimised, with summed or averaged log-probs and every modifier, and the arms it was of."""
    arms: dict[str, list[str]] = {}
    for row in metrics:
        loss = _get(row, "train", "loss")
        if loss is not None and row.get("arm") not in arms.setdefault(loss, []):
            arms[loss].append(row["arm"])
    if len(arms) < 2:
        return next((f"loss: {clean(loss)}" for loss in arms), None)
    return "\n".join(f"loss of {', '.join(names)}: {clean(loss)}" for loss, names in arms.items())


def _table(
    title: str, rows: _Rows, columns: Sequence[_Column], caption: str | None = None, *, round_column: bool = True
) -> Table:
    """`rows` under `columns`, after the arm, the seed (where there are several) and the round."""
    names: list[_Column] = []
    if len({row.get("seed") for row in rows}) > 1:
        names.append(("seed", lambda row: number(row.get("seed"))))
    if round_column:
        names.append(("round", lambda row: number(row.get("round"))))
    table = Table(
        title=Text(title, style="bold"),
        caption=Text(caption) if caption else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("arm", overflow="fold", min_width=10, max_width=14)
    for header, _ in [*names, *columns]:
        if header == "dropped":
            table.add_column(header, overflow="fold", min_width=12, max_width=40)
        else:
            # On a terminal narrower than the table an interval wraps; nothing is ever cut off.
            table.add_column(header, justify="right", overflow="fold", min_width=min(5, len(header)))
    for row in rows:
        cells = [str(row.get("arm") or ABSENT), *(cell(row) for _, cell in [*names, *columns])]
        table.add_row(*(Text(clean(cell)) for cell in cells))
    return table


def _mean(value: object) -> object:
    """A figure that may be a bare number or a `{mean, low, high}` mapping."""
    return value.get("mean") if isinstance(value, Mapping) else value


def _counts(value: object) -> str:
    """`3 ties, 2 margin`: the counts by reason, largest first; zero counts are left out."""
    if not isinstance(value, Mapping):
        return ABSENT
    found = [(reason, n) for reason, n in value.items() if isinstance(n, int) and n > 0]
    return ", ".join(f"{clean(reason)} {n}" for reason, n in sorted(found, key=lambda item: -item[1])) or "0"


def _losses(row: Mapping[str, Any]) -> str:
    first, last = (number(_get(row, "train", key), places=3) for key in ("loss_first", "loss_last"))
    return ABSENT if ABSENT == first == last else f"{first} → {last}"


def _scientific(value: object) -> str:
    found = _finite(value)
    return ABSENT if found is None else f"{found:.1e}"


def _seconds_of(stage: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        part = _finite(_get(row, "seconds", PART_OF.get(stage, "")))
        text = number(_add(_get(row, "seconds", stage), part), places=1)
        return text + "*" if text != ABSENT and stage in (row.get("reused") or ()) else text

    return cell


def _add(value: object, more: float | None) -> object:
    found = _finite(value)
    return value if found is None or more is None else found + more


def _total(rows: Iterable[Mapping[str, Any]], *paths: tuple[str, str]) -> float | None:
    """The sum of the figures at `paths` that are there; None when none is."""
    values = [found for row in rows for path in paths if (found := _finite(_get(row, *path))) is not None]
    return sum(values) if values else None


# --- answers ---


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """An answer and who gave it, for example "initial" or "on_policy, round 3"."""

    label: str
    text: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class ShownPrompt:
    """A prompt with the answers to show, the earliest first."""

    prompt: str
    answers: tuple[ShownAnswer, ...]


def sample_answers(shown: Sequence[ShownPrompt]) -> Group:
    """Each prompt with its answers below it, the scores before them."""
    return _spaced(*(_answers(item) for item in shown))


def _answers(item: ShownPrompt) -> Table:
    table = Table(
        title=Text(f"Prompt: {_short(clean(item.prompt))}", style="bold"),
        title_justify="left",
        box=None,
        show_header=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column(overflow="fold", max_width=24)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for answer in item.answers:
        text = _short(clean(answer.text, lines=True)) or "(empty)"
        table.add_row(Text(clean(answer.label)), Text(number(answer.score, places=3)), Text(text))
    return table


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
