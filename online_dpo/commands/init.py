"""`online-dpo init`: a folder with an experiment that runs as it stands, and a judge to change."""

from __future__ import annotations

import json
import os
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from online_dpo.commands.common import Debug, errors_in_one_line
from online_dpo.config import NAME
from online_dpo.errors import ConfigError, one_line

STARTER = ("experiment.yaml", "my_judge.py", "prompts.jsonl", "README.md")
FIRST_NAME = "my-experiment"
FIRST_MODEL = "smollm2-135m-instruct"
"""What the starter files call the experiment and its model."""

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="a new folder, or one without these files")]
Model = Annotated[
    str | None, typer.Option("--model", help=f"a packaged model, a folder, or a hub id; default: {FIRST_MODEL}")
]


def init(folder: Folder, model: Model = None, debug: Debug = False) -> None:
    """Write an experiment with a judge of your own: it runs as it stands, for you to change."""
    with errors_in_one_line(debug):
        from online_dpo.display import clean, make_console

        written = write_starter(folder, model)
        experiment = folder / "experiment.yaml"
        console = make_console()
        for line in (*(f"wrote {path}" for path in written), f"next: online-dpo check {shlex.quote(str(experiment))}"):
            console.print(clean(line), markup=False, soft_wrap=True)


def write_starter(folder: Path, model: str | None = None) -> list[Path]:
    """Write the starter files into `folder` and return their paths; the experiment is named after the folder.

    `model`: another than the packaged one. Raises `ConfigError` when one of the files is there already, or the
    folder cannot be written; nothing is written then.
    """
    there = [name for name in STARTER if os.path.lexists(folder / name)]
    if there:
        raise ConfigError(f"{folder} has {', '.join(there)} already; nothing was written: choose another folder")
    called = folder.resolve().name
    name = called if NAME.fullmatch(called) else FIRST_NAME
    texts = {file: (files("online_dpo") / "starter" / file).read_text(encoding="utf-8") for file in STARTER}
    texts["README.md"] = texts["README.md"].replace(FIRST_NAME, name)
    texts["experiment.yaml"] = _named(texts["experiment.yaml"], name, model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            with (folder / file).open("x", encoding="utf-8") as handle:
                handle.write(text)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {one_line(error)}") from error
    return [folder / file for file in STARTER]


def _named(experiment: str, name: str, model: str | None) -> str:
    """The experiment with its name and model put in. JSON strings are YAML, whatever is in them."""
    experiment = experiment.replace(f"name: {FIRST_NAME}", f"name: {json.dumps(name)}", 1)
    if model is None:
        return experiment
    # A folder is meant from where the command was given; the experiment looks beside itself first.
    path = Path(model).expanduser()
    found = str(path.resolve()) if path.is_dir() else model
    return experiment.replace(f"model: {FIRST_MODEL}", f"model: {json.dumps(found)}", 1)
