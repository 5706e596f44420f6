"""`online-dpo judge ask`: a person ranks a run's answers in the terminal, without knowing where they come from."""

from __future__ import annotations

import getpass
import io
import re
import string
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from online_dpo.commands.common import Debug, errors_in_one_line, reading
from online_dpo.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from online_dpo.asking_people import Question, Sitting
    from online_dpo.judging.people import Ranking

WIDTH = 100
"""Columns of text: longer lines are hard to read."""
HELP = (
    "Type the letters, best first: b > a = c says that b is best and that a and c are equally good.",
    "=        all are equally good",
    "s        skip this one; with words after it, why: s both are in French",
    "u        undo the last answer: its question comes again",
    "q        quit; the same command goes on from here",
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, for example runs/quickstart")]
Arm = Annotated[str | None, typer.Option("--arm", help="only this arm's answers")]
Seed = Annotated[int | None, typer.Option("--seed", help="only this seed's answers")]
Round = Annotated[int | None, typer.Option("--round", min=0, help="only this round's answers")]
Stage = Annotated[
    Literal["train", "held_out"],
    typer.Option("--stage", help="train: what was sampled for pairs; held_out: arms beside each other and a round"),
]
Against = Annotated[int, typer.Option("--against", min=0, help="held_out: the round that stands beside --round")]
Sample = Annotated[int | None, typer.Option("--sample", min=1, help="ask about so many prompts, drawn by chance")]
Name = Annotated[str | None, typer.Option("--name", help="who answers; default: your login name")]


def judge_ask(
    folder: RunFolder,
    arm: Arm = None,
    seed: Seed = None,
    index: Round = None,
    stage: Stage = "train",
    against: Against = 0,
    sample: Sample = None,
    name: Name = None,
    debug: Debug = False,
) -> None:
    """Rank a run's answers yourself, blind and in random order. Stop at any time; the same command goes on."""
    with errors_in_one_line(debug):
        from online_dpo.asking_people import Choice, Sitting, gather, open_answers, take_sample
        from online_dpo.display import make_console
        from online_dpo.store import RunStore

        person = name if name is not None else _login_name()
        console = make_console()
        with reading(folder):
            store = RunStore.open(folder)
            questions, alike = gather(store, Choice(stage, arm, seed, index, against), person)
        with open_answers(store.root, person) as file:
            sitting = Sitting(take_sample(questions, sample), file)
            if alike:
                _say(console, f"left out: {_prompts(alike)} whose answers all look the same")
            try:
                _sit(sitting, console)
            except KeyboardInterrupt:
                console.print()
                _sum_up(sitting, console)
                raise typer.Exit(130) from None
            _sum_up(sitting, console)


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError) as error:
        raise ConfigError("your login name is not known here; say who answers with --name") from error


def _sit(sitting: Sitting, console: Console) -> None:
    """Ask until all is answered and not undone, or the person quits."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        question = sitting.current()
        if question is None:
            _say(console, "that was the last one; u undoes it, Enter ends")
            if _read(console) not in ("u", "U") or not sitting.undo():
                return
        elif not _ask(question, sitting, console):
            return


def _ask(question: Question, sitting: Sitting, console: Console) -> bool:
    """Show a question and keep what the person says of it, or undo; False to quit."""
    from online_dpo.asking_people import readable

    _show(question, f"{sitting.done + 1} of {len(sitting.questions)}", console)
    began = time.monotonic()
    while True:
        command, _, rest = (line := _read(console)).partition(" ")
        match command.lower():
            case "q":
                return False
            case "u":
                if sitting.undo():
                    _say(console, "taken back")
                    return True
                _say(console, "there is nothing to undo")
            case "s":
                sitting.skip(question, readable(rest), time.monotonic() - began)
                return True
            case "?" | "help":
                _say(console, "\n".join(HELP))
            case _:
                try:
                    order = parse_order(line, len(question.seen))
                except ValueError as error:
                    _say(console, str(error))
                    continue
                sitting.rank(question, order, time.monotonic() - began)
                return True


def parse_order(text: str, count: int) -> Ranking:
    """What a person typed about `count` answers: "b > a = c", "=" for all equal, of two also "a" alone.

    Raises `ValueError` with what is wrong, for the person.
    """
    letters = string.ascii_lowercase[:count]
    example = "a, b or =" if count == 2 else f"an order of {_listed(letters)}, as in {_example(letters)}"
    typed = "".join(text.lower().split())
    if typed == "=":
        return (tuple(range(count)),)
    if count == 2 and typed in ("a", "b"):
        return ((0,), (1,)) if typed == "a" else ((1,), (0,))
    if not re.fullmatch(r"\w([>=]\w)*", typed):
        raise ValueError(f"type {example} (? for help)")
    groups = [group.split("=") for group in typed.split(">")]
    named = [letter for group in groups for letter in group]
    for letter in named:
        if letter not in letters:
            raise ValueError(f"there is no answer {letter}; type {example}")
        if named.count(letter) > 1:
            raise ValueError(f"{letter} stands there twice; type {example}")
    if len(named) < count:
        missing = [letter for letter in letters if letter not in named]
        raise ValueError(f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} missing; type {example}")
    return tuple(tuple(sorted(letters.index(letter) for letter in group)) for group in groups)


def _example(letters: str) -> str:
    """An order of three letters or more, with a tie in it."""
    return " > ".join(["b", "a = c", *letters[3:]])


def _listed(letters: str | list[str]) -> str:
    return ", ".join(letters[:-1]) + (" and " if len(letters) > 1 else "") + letters[-1]


# --- the screen ---


def _show(question: Question, progress: str, console: Console) -> None:
    """The prompt, the answers behind letters, and what can be typed. All text is a model's or a file's."""
    from rich.rule import Rule
    from rich.text import Text

    from online_dpo.asking_people import readable

    width = min(console.width, WIDTH)
    console.print()
    console.print(Rule(Text(progress), style="dim"), width=width)
    alone = len(question.messages) == 1
    rows = [("" if alone else readable(message.role), readable(message.content)) for message in question.messages]
    console.print(_grid([("prompt", text) if alone else (role, text) for role, text in rows], "dim"), width=width)
    console.print()
    answers = [(string.ascii_lowercase[i], readable(question.texts[g[0]])) for i, g in enumerate(question.seen)]
    console.print(_grid(answers, "bold"), width=width)
    letters = string.ascii_lowercase[: len(answers)]
    what = "the better one: a, b or =" if len(answers) == 2 else f"best first, as in {_example(letters)}"
    console.print()
    console.print(Text(f"{what}   s skip   u undo   q quit   ? help", style="dim"))


def _grid(rows: list[tuple[str, str]], style: str) -> Table:
    """Names and what they stand for, an empty line between them."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for number, (name, text) in enumerate(rows):
        if number:
            table.add_row()
        table.add_row(Text(name, style=style), Text(text) if text else Text("(empty)", style="dim"))
    return table


def _read(console: Console) -> str:
    """One line from the person, spaces at its ends taken away; "q" at the end of the input."""
    from rich.text import Text

    from online_dpo.display import clean

    console.print(Text("> "), end="")
    line = sys.stdin.readline()
    typed = line.strip()
    if not sys.stdin.isatty():
        console.print(Text(clean(typed)))
    elif not line:
        console.print()
    return typed if line else "q"


def _say(console: Console, text: str) -> None:
    from rich.text import Text

    from online_dpo.display import clean

    console.print(Text(clean(text, lines=True)), soft_wrap=True)


def _sum_up(sitting: Sitting, console: Console) -> None:
    """What there is now, and how it becomes a judge."""
    total = len(sitting.questions)
    skipped = f", {sitting.skipped} of them skipped" if sitting.skipped else ""
    done = f"all {_prompts(total)} done" if sitting.done == total else f"{sitting.done} of {_prompts(total)} done"
    _say(console, f"{done}{skipped}" + (f"; kept in {sitting.file.path}" if sitting.done else ""))
    if sitting.done > sitting.skipped:
        _say(console, f'as a judge: {{use: "judges.human:HumanJudge", answers: "{sitting.file.path}"}}')
    if sitting.done < total:
        _say(console, "the same command goes on")


def _prompts(count: int) -> str:
    return f"{count} prompt{'' if count == 1 else 's'}"
