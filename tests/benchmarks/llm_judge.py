"""How fast a judge that asks a language model is, and what a server that dies costs it: one JSON line a figure.

    python tests/benchmarks/llm_judge.py [--seconds 40] [--storm 24] [--pairs FILE]

Starts vLLM with SmolLM2-135M on loopback. Throughput: verdicts of the pairwise judge, through the cache, at 1, 8 and
32 requests at once, for `--seconds` each; every comparison is new. Storm: `--storm` comparisons in both orders; a third
through, the server is killed (SIGKILL) and started again. The pairs are people's preferences (HH-RLHF helpful-base).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from vllm_server import MODEL, VllmServer  # noqa: E402 # after the path

from online_dpo.config import JudgeSpec  # noqa: E402
from online_dpo.judging import AskedJudge, Asking, Compared, Comparison, Item, Opinion, VerdictCache, open_judge  # noqa: E402
from online_dpo.preferences import as_comparison, load_preferences  # noqa: E402

PAIRS = ROOT.parent / "shared" / "data" / "pairs" / "helpful-base.test.jsonl.gz"
LONGEST_TEXT = 600
LEVELS = (1, 8, 32)


def comparisons(path: str) -> Iterator[Comparison]:
    """People's preferences with short texts, as prompt, chosen and rejected."""
    for preference in load_preferences(path, split="train").pairs:
        texts = [preference.chosen, preference.rejected, *(message.content for message in preference.messages)]
        if sum(map(len, texts)) <= LONGEST_TEXT:
            yield as_comparison(preference)


def judge(server: VllmServer, cache: VerdictCache, concurrency: int) -> AskedJudge:
    """The pairwise judge; any probability of A and B counts, since SmolLM2 would rather say something else."""
    params = {"model": MODEL, "base_url": server.url, "min_mass": 0.0, "timeout_s": 240.0, "patience_s": 500.0}
    spec = JudgeSpec.model_validate({"use": "judges.llm:LLMJudge", **params, "concurrency": concurrency})
    return open_judge(spec, [], Asking(cache))


def say(figure: str, value: float, unit: str, **beside: float) -> None:
    """One JSON line."""
    row = {"figure": figure, "value": value, "unit": unit, **beside}
    print(
        json.dumps({key: round(cell, 3) if isinstance(cell, float) else cell for key, cell in row.items()}), flush=True
    )


def throughput(
    server: VllmServer, cache: VerdictCache, pairs: Iterator[Comparison], level: int, seconds: float
) -> None:
    """Verdicts and tokens a second at `level` requests at once."""
    asked = judge(server, cache, level)
    before, done = cache.spent(), 0
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        wave = [next(pairs) for _ in range(level)]
        done += sum(isinstance(answer, Opinion) for answer in asked.prefer([*wave, *map(_swapped, wave)]))
    took = time.monotonic() - began
    spent = {item: amount - before.get(item, 0.0) for item, amount in cache.spent().items()}
    tokens = {item: spent[item] for item in ("prompt_tokens", "completion_tokens")}
    say(f"verdicts, {level} at once", done / took, "1/s", verdicts=done, seconds=took)
    say(f"tokens, {level} at once", spent["tokens"] / took, "1/s", **tokens)


def _swapped(comparison: Comparison) -> Comparison:
    prompt, first, second = comparison
    return prompt, second, first


def storm(server: VllmServer, cache: VerdictCache, items: list[Item]) -> list[Compared]:
    """The server is killed and started again in the middle; what became of the comparisons."""
    asked = judge(server, cache, 8)
    wanted, answered = 2 * len(items), server.completions()
    kept, before = len(cache), cache.spent()
    away: list[float] = []

    def kill_and_start() -> None:
        while server.completions() < answered + wanted // 3:
            time.sleep(0.05)
        server.kill()
        away.append(server.start())

    killer = threading.Thread(target=kill_and_start)
    killer.start()
    began = time.monotonic()
    rows = [row for found in asked.comparisons(items) for row in found]
    took = time.monotonic() - began
    killer.join()
    spent = {item: amount - before.get(item, 0.0) for item, amount in cache.spent().items()}
    verdicts = sum(isinstance(answer, Opinion) for row in rows for answer in (row.there, row.back))
    say("storm: asked for", wanted, "verdicts", seconds=took, server_away_s=away[0])
    say("storm: had", verdicts, "verdicts", kept_in_the_cache=len(cache) - kept)
    say("storm: answers", spent["calls"], "by the ledger", by_the_servers_log=server.completions() - answered)
    say("storm: tried again", spent.get("retries", 0.0), "requests")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="for each number of requests at once")
    parser.add_argument("--storm", type=int, default=24, help="comparisons of the storm")
    parser.add_argument("--pairs", default=str(PAIRS), help="preferences, in any form that online-dpo reads")
    options = parser.parse_args()
    pairs = comparisons(options.pairs)
    with tempfile.TemporaryDirectory() as folder, VerdictCache(Path(folder) / "cache.sqlite") as cache:
        server = VllmServer(Path(folder) / "vllm.log")
        try:
            say("server's start", server.start(), "s")
            judge(server, cache, 1).prefer([next(pairs)])  # the first request is slower than all others
            items: list[Item] = [(prompt, answers) for prompt, *answers in itertools.islice(pairs, options.storm)]
            for level in LEVELS:
                throughput(server, cache, pairs, level, options.seconds)
            rows = storm(server, cache, items)
        finally:
            server.kill()
    flips = [flip for row in rows if (flip := row.swapped()) is not None]
    outcomes = [p for row in rows if isinstance(p := row.outcome("average"), float)]
    say("verdicts that went with the place", sum(flips) / max(1, len(flips)), "share", comparisons=len(flips))
    right = sum((p > 0.5) + 0.5 * (p == 0.5) for p in outcomes)
    say("agreement with people", right / max(1, len(outcomes)), "share", comparisons=len(outcomes))


if __name__ == "__main__":
    main()
