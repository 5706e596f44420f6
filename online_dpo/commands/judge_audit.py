"""`online-dpo judge audit`: how far a judge can be trusted, measured on pairs that people have judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError

from online_dpo.commands.common import Debug, Quiet, errors_in_one_line
from online_dpo.config import JudgeSpec, apply_override, refuse_literal_keys
from online_dpo.errors import ConfigError, JudgeError
from online_dpo.key_faults import describe
from online_dpo.yaml_file import read_yaml

if TYPE_CHECKING:
    from online_dpo.audit.asking import Advance
    from online_dpo.audit.auditing import Audit
    from online_dpo.judging import AskedJudge, VerdictCache
    from online_dpo.preferences import PreferenceSet

LengthUnit = Literal["characters", "words"]
Opened = tuple[JudgeSpec, list[Path]]
YAML = (".yaml", ".yml")
TIMEOUT_S = 600.0
"""An experiment's `judge_timeout`, where it says nothing."""
SHOWN = 40
"""Characters of a setting's value that the judge's name in tables holds."""


def judge_audit(
    judge: Annotated[str, typer.Option("--judge", metavar="SPEC", help='"module:Class", or a YAML file with a judge')],
    pairs: Annotated[list[str], typer.Option("--pairs", metavar="FILE", help="judged pairs; may be repeated")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a key of the judge; may be repeated")
    ] = None,
    against: Annotated[str | None, typer.Option("--against", metavar="SPEC", help="a judge to agree with")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="at most this many pairs of each file")] = None,
    seed: Annotated[int, typer.Option("--seed", help="of the drawn pairs and of the bootstrap")] = 0,
    length: Annotated[LengthUnit, typer.Option("--length", help="the unit of length")] = "characters",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="write audit.json, audit.png and audit.svg")
    ] = None,
    cache: Annotated[Path | None, typer.Option("--cache", metavar="FILE", help="verdicts asked once")] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.001, metavar="SECONDS", help="that one call of the judge may take")
    ] = TIMEOUT_S,
    markdown: Annotated[bool, typer.Option("--markdown", help="print a Markdown table instead")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Audit a judge: accuracy, calibration, order, length, ties, abstentions, cost."""
    with errors_in_one_line(debug):
        specs = [_spec(judge, sets or []), *([_spec(against, [])] if against is not None else [])]
        from online_dpo.display import make_console, make_progress
        from online_dpo.judging import VerdictCache
        from online_dpo.preferences import load_preferences

        folders = _output_folders(output, pairs)
        found = [load_preferences(file, folders=[Path.cwd()], limit=limit, seed=seed) for file in pairs]
        kept = VerdictCache(cache) if cache is not None else None
        try:
            asked = [_open(spec, kept, timeout) for spec in specs]
            with make_progress(quiet, make_console(stderr=True)) as progress:
                audits = []
                for one in found:
                    label = f"auditing on {Path(one.source).name}"
                    progress.start(label, len(one.pairs) * len(asked), "pairs")
                    audits.append(_audit(asked, one, length, seed, progress.advance))
                    progress.finish()
        finally:
            if kept is not None:
                kept.close()
        for audit, folder in zip(audits, folders, strict=True):
            _write(audit, folder)
        _print(audits, found, folders, markdown)


def _spec(text: str, sets: Sequence[str]) -> Opened:
    """The judge that `text` and `--set` name, and the folders where its module and files are looked for."""
    file = Path(text).expanduser()
    data: dict[str, Any] = {"use": text}
    folders = [Path.cwd()]
    if file.suffix in YAML:
        data = read_yaml(file)
        # An experiment's own file serves too.
        inside = data.get("judge", data) if "use" not in data else data
        data = {"use": inside} if isinstance(inside, str) else inside
        folders = [file.resolve().parent, *folders]
    for assignment in sets:
        apply_override(data, assignment)
    refuse_literal_keys(data, f"judge {text}")
    try:
        return JudgeSpec.model_validate(data), folders
    except ValidationError as error:
        raise ConfigError(f"judge {text}: {describe(error, JudgeSpec)}") from error


def _open(opened: Opened, cache: VerdictCache | None, timeout: float) -> AskedJudge:
    """The judge in this process, named with its settings so that two of one class can be told apart."""
    from online_dpo.judging import Asking, open_judge

    spec, folders = opened
    asked = open_judge(spec, folders, Asking(cache=cache, limit_s=timeout))
    if asked.uses_policy:
        raise JudgeError(f"judge '{spec.use}' asks the policy of a round: there is none to audit it with")
    settings = ", ".join(f"{key}={value!s:.{SHOWN}}" for key, value in spec.params.items())
    asked.name = f"{spec.use} ({settings})" if settings else spec.use
    return asked


def _audit(asked: Sequence[AskedJudge], pairs: PreferenceSet, unit: LengthUnit, seed: int, advance: Advance) -> Audit:
    from online_dpo.audit.auditing import audit_labelled

    judge, *other = asked
    return audit_labelled(
        judge,
        pairs.pairs,
        against=other[0] if other else None,
        unit=unit,
        source=Path(pairs.source).name,
        seed=seed,
        advance=advance,
    )


def _output_folders(output: Path | None, pairs: Sequence[str]) -> list[Path | None]:
    """Where each file's audit goes: `output` itself for one file, folders in it named after several."""
    if output is None:
        return [None] * len(pairs)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"cannot write to {output}: it is a file; name a folder")
    if len(pairs) == 1:
        return [output]
    names = [Path(file).name.partition(".")[0] for file in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"two --pairs files are called '{twice}': their audits would overwrite each other in {output}"
        )
    return [output / name for name in names]


def _write(audit: Audit, folder: Path | None) -> None:
    if folder is None:
        return
    from online_dpo.audit.figures import draw_audit
    from online_dpo.files import write_json

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "audit.json", audit.as_dict())
        draw_audit(audit, folder)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error}") from error


def _print(
    audits: Sequence[Audit], found: Sequence[PreferenceSet], folders: Sequence[Path | None], markdown: bool
) -> None:
    from online_dpo.audit.display import audit_table, markdown_header, markdown_row
    from online_dpo.display import clean, make_console

    if markdown:
        print("\n".join([markdown_header(), *(markdown_row(one) for one in audits)]))
        return
    console = make_console()
    for audit, pairs, folder in zip(audits, found, folders, strict=True):
        console.print(audit_table(audit))
        lost = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in pairs.dropped.items() if count)
        if lost:
            console.print(clean(f"rows left out of {pairs.source}: {lost}"), markup=False, soft_wrap=True)
        if folder is not None:
            console.print(clean(f"audit: {folder / 'audit.json'}, audit.png, audit.svg"), markup=False, soft_wrap=True)
