"""An engine without memory for its batch: torch's real allocator error in the engine's process (`injected/`).

With memory for half a batch the run says so in one line, once, and goes on with half of it. Log-probs are computed in
another batch and are the same to rounding (1e-5 nats a token), and so is what is trained on them: compared are the
sampled tokens of round 1. With less memory than for half, the run ends in one line and
status 1, and goes on when there is enough. vLLM takes its memory at the start and queues what does not fit; its want of
memory on a GPU is not injected here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from ground import Ground, Outcome, injected
from victim import Victim

ROWS = 8
FIRST = 4
"""Sequences of a batch: four prompts with two candidates each; the first one is of four held-out answers."""


def inject(ground: Ground) -> Iterator[Outcome]:
    """Two."""
    reference = ground.reference()
    for what, rows in (("memory for half a batch", ROWS // 2), ("memory for a quarter of the first batch", FIRST // 4)):
        if ground.options.only not in what:
            continue
        folder, root = ground.lay()
        environment = injected("ROWS", rows)
        victim = Victim(folder, "run", "experiment.yaml", environment=environment)
        status = victim.end()
        enough = rows == ROWS // 2
        said = victim.err.read_text(encoding="utf-8", errors="replace")
        if enough:
            fine = status == 0 and said.count("it goes on with 4 (") == 1
        else:
            fine = status == 1 and "set engine.batch_size" in victim.error()
            again = Victim(folder, "resume", str(root), "--quiet")
            fine = fine and again.end() == 0
        left, _ = victim.gone()
        difference = _other_tokens(root, reference.root) if fine else f"ended with {status}: {victim.said()}"
        how = "said once, the same tokens" if enough else "one line; resumed with enough, the same tokens"
        yield Outcome(what, not difference and not left, difference or str(left or how))


def _other_tokens(root: Path, reference: Path) -> str:
    """Files whose sampled tokens differ; those of round 1: later rounds sample from policies that are the same only to
    rounding."""
    files = [file.relative_to(reference) for file in reference.rglob("round_01/candidates.parquet")]
    columns = ["prompt_id", "index", "token_ids", "text"]
    other = [
        str(file)
        for file in files
        if not (root / file).exists()
        or pq.read_table(root / file, columns=columns) != pq.read_table(reference / file, columns=columns)
    ]
    return ", ".join(other) if files else "nothing to compare"
