"""Files of a run that were truncated, corrupted or edited by hand while it was stopped.

`resume` says so in one line that names the file (or the policy), and exits with 2; nothing of the run is changed by it.
With the file put back it goes on, and ends with the undisturbed run's bits. The run is stopped in the second arm's last
training, so that each of the files is one that the rest of the run reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from ground import Ground, Outcome, at_kill, results
from victim import Victim

ROUND = "arms/self_offline/seed_0/"


def truncated(file: Path) -> None:
    """The second half is gone, as after a crash of the machine."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def one_bit(file: Path) -> None:
    """One bit in the middle is another."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def edited(file: Path) -> None:
    """A valid parquet file in which somebody improved an answer."""
    table = pq.read_table(file)
    texts = table["text"].to_pylist()
    texts[0] += " The end."
    place = table.schema.get_field_index("text")
    pq.write_table(table.set_column(place, "text", pa.array(texts, pa.string())), file)


def gone(file: Path) -> None:
    """Deleted."""
    file.unlink()


DAMAGES: tuple[tuple[str, Callable[[Path], None], str], ...] = (
    ("a truncated policy", truncated, f"{ROUND}round_01/policy/model.safetensors"),
    ("one bit of a policy", one_bit, f"{ROUND}round_01/policy/model.safetensors"),
    ("corrupted candidates", one_bit, f"{ROUND}round_02/candidates.parquet"),
    ("candidates edited by hand", edited, f"{ROUND}round_02/candidates.parquet"),
    ("truncated verdicts", truncated, f"{ROUND}round_02/verdicts.parquet"),
    ("deleted pairs", gone, f"{ROUND}round_02/pairs.parquet"),
    ("a truncated record of a stage", truncated, f"{ROUND}round_02/stages/sample.json"),
    ("truncated prompts", truncated, "prompts.parquet"),
    ("a truncated manifest", truncated, "manifest.json"),
)


def inject(ground: Ground) -> Iterator[Outcome]:
    """One a damage, all done to one stopped run."""
    reference = ground.reference()
    folder, root = ground.lay()
    victim = Victim(folder, "run", "experiment.yaml", "--quiet")
    victim.until(lambda: victim.label(root) == "self_offline · seed 0 · round 2 train")
    victim.kill()
    victim.gone()
    kills = [at_kill(root)]
    told = []
    for what, damage, name in DAMAGES:
        if ground.options.only in what:
            told.append((what, _told(folder, root, damage, root / name)))
    last = Victim(folder, "resume", str(root), "--quiet")
    difference = ground.same(root, reference, kills) if last.end() == 0 else last.said()
    for what, (fine, seen) in told:
        yield Outcome(what, fine and not difference, difference or seen)


def _told(folder: Path, root: Path, damage: Callable[[Path], None], file: Path) -> tuple[bool, str]:
    """Whether `resume` says what is wrong with `file`, and changes nothing; and what it says."""
    before = file.with_name(f"{file.name}.kept")
    shutil.copy2(file, before)
    kept = before.rename(folder / "kept")
    damage(file)
    there = results(root) if file.suffix == ".parquet" and file.exists() else {}
    victim = Victim(folder, "resume", str(root), "--quiet")
    status, line = victim.end(), victim.error()
    changed = bool(there) and results(root) != there
    left, _ = victim.gone()
    if file.exists():
        file.write_bytes(kept.read_bytes())  # in place: another arm's file may be the same one
    else:
        kept.rename(file)
    named = file.parent if file.parent.name == "policy" else file  # a policy is one output, whatever its files
    fine = status == 2 and str(named.relative_to(root)) in line and not changed and not left
    return fine, line.removeprefix("online-dpo: ") if fine else f"ended with {status}: {victim.said()} {left}"
