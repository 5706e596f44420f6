"""How long a report takes to build: 4 arms, 3 seeds, 5 rounds, 256 prompts, on a run that a model of sixty words made.

    python tests/benchmarks/report_page.py [FOLDER]

The run stays in FOLDER (default: a temporary one) for looking at its report. Prints one JSON line, with how
long the page takes to open where Chromium and playwright are here.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from word_model import run_words  # after the path

ARMS = {
    "on_policy": {},
    "semi_online": {"source": {"every": 2}},
    "self_offline": {"source": "initial"},
    "low_beta": {"dpo": {"beta": 0.03, "lr": 20.0}},
}


def open_ms(html: Path) -> float | None:
    """Milliseconds from asking for the page to the end of its loading, script included, in Chromium: the median of 5
    times after one. None without Chromium or playwright."""
    chromium = shutil.which("chromium")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        return None
    from playwright.sync_api import sync_playwright

    taken: list[float] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(6):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(html.resolve().as_uri())
            taken.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
            page.close()
        browser.close()
    return round(statistics.median(taken[1:]))


def main() -> None:
    """Make the run where there is none yet, then build its report as the command does."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(sys.argv[1] if len(sys.argv) > 1 else place) / "words"
        if not root.exists():
            run_words(root, 256, 256, seeds=[0, 1, 2], rounds=5, arms=ARMS, audit={"prompts": 32})
        began, computing = time.perf_counter(), time.process_time()
        from online_dpo.report.reporting import report_runs

        verdict, [html, *_] = report_runs([root], root / "report")
        figure = {
            "figure": "report of 4 arms × 3 seeds × 5 rounds × 256 prompts, imports included",
            "seconds": round(time.perf_counter() - began, 1),
            "cpu_seconds": round(time.process_time() - computing, 1),
            "page_mb": round(html.stat().st_size / 1e6, 1),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
            "opens_in_ms": open_ms(html),
            "verdict": verdict,
        }
        print(json.dumps(figure, ensure_ascii=False))


if __name__ == "__main__":
    main()
