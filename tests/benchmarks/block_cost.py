"""What a block of `source: {every_steps: k}` costs beside its sampling and its optimiser steps, from a finished run.

`python tests/benchmarks/block_cost.py RUN ARM [SEED]`: means over all blocks but the very first, which pays for what is
built once, in seconds; and, for every arm, the seconds of these stages in a round after the first.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def parts(folder: Path) -> dict[str, float]:
    """Seconds of one block: what it is there for, and what comes with it."""
    stages = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "stages").glob("*.json")}
    sample, train = stages["sample"], stages["train"]
    steps = train["info"]["tokens"] / train["info"]["tokens_per_second"]
    return {
        "sampling": sample["info"]["seconds"],
        "optimiser steps": steps,
        "weights into the engine, answers onto disk": sample["seconds"] - sample["info"]["seconds"],
        "judging and pairing": stages["judge"]["seconds"] + stages["pair"]["seconds"],
        "reference's log-probs, weights loaded": train["info"]["seconds"] - steps,
        "policy and optimiser state onto disk, digests": train["seconds"] - train["info"]["seconds"],
    }


def blocks(run: Path, arm: str, seed: str) -> Iterator[Path]:
    """The blocks that made steps, round by round, without the first."""
    found = sorted((run / "arms" / arm / f"seed_{seed}").glob("round_*/block_*/stages/train.json"))
    yield from (path.parent.parent for path in found[1:])


def rounds(run: Path, arm: str, seed: str) -> list[dict[str, Any]]:
    """The figures of the arm's trained rounds."""
    files = sorted((run / "arms" / arm / f"seed_{seed}").glob("round_*/metrics.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files[1:]]


def main(run: Path, arm: str, seed: str = "0") -> None:
    """Print the table."""
    each = [parts(folder) for folder in blocks(run, arm, seed)]
    if not each:
        raise SystemExit(f"{run}: arm '{arm}' has no two blocks that were trained")
    print(f"{arm}: means of {len(each)} blocks, seconds")
    for name in each[0]:
        print(f"  {name:<48}{statistics.mean(one[name] for one in each):8.3f}")
    for other in sorted(path.name for path in (run / "arms").iterdir()):
        whole = [
            sum(row["seconds"][stage] for stage in ("sample", "judge", "pair", "train"))
            for row in rounds(run, other, seed)
        ]
        print(f"{other}: sample, judge, pair and train of a round  {statistics.mean(whole[1:] or whole):.1f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
