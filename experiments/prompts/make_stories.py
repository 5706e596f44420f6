"""Writes stories.jsonl: openings of children's stories, every one different, in an order that no list shows.

python experiments/prompts/make_stories.py
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

COUNT = 640
NAMES = ("Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Sue", "Tim", "Lucy", "Jack", "Amy")
OPENINGS = (
    "Once upon a time, there was a child named {name}. {name} {did}",
    "One day, {name} {did}",
    "{name} was in the {place}. {name} {did}",
    "It was a cold morning. {name} {did}",
    "{name} had a bad day. Then {name} {did}",
    "In the {place}, {name} {did}",
)
PLACES = ("park", "garden", "forest", "kitchen", "zoo", "school")
DEEDS = (
    "saw a big dog.",
    "found an old box.",
    "lost a red ball.",
    "heard a loud noise.",
    "wanted to bake a cake.",
    "met a sad bird.",
    "broke a cup.",
    "went to see a friend.",
    "could not find the key.",
    "looked at the dark sky.",
    "got a new toy.",
    "wanted to climb a tree.",
)


def main() -> None:
    """Write the file beside this one."""
    texts = {
        opening.format(name=name, place=place, did=did)
        for opening, name, place, did in itertools.product(OPENINGS, NAMES, PLACES, DEEDS)
    }
    drawn = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:COUNT]
    rows = [{"id": f"story-{number:03d}", "prompt": text} for number, text in enumerate(drawn)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(__file__).parent / "stories.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
