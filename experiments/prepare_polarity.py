"""Makes the files of sentiment_frontier.yaml from the sentence polarity dataset (Pang and Lee 2005, CC BY 4.0).

    python experiments/prepare_polarity.py sentence_polarity.zip

Writes into experiments/polarity/:

- `sft.jsonl`: {prompt, response}, the first words of a sentence and its rest: what the policy learns to write;
- `prompts.jsonl`: the first words of other sentences: what it is asked to go on with;
- `gold.jsonl`, `proxy.jsonl`: {prompt, chosen, rejected}, a positive and a negative sentence, of two disjoint halves.

Fit the two judges with `online-dpo judge fit experiments/polarity/gold.jsonl -o experiments/judges/polarity_gold` and
the same for `proxy`. No sentence is in two of the files.
"""

from __future__ import annotations

import json
import random
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

WORDS = 4
"""Words of a sentence that are its prompt."""
SHARES = {"gold": 2400, "proxy": 400, "sft": 1600, "prompts": 500}
"""Sentences of either sign in each file. The proxy sees few: a judge that can be over-optimised is the point."""


def main(archive: Path) -> None:
    """Write the four files."""
    folder = Path(__file__).parent / "polarity"
    folder.mkdir(exist_ok=True)
    positive, negative = sentences(archive, "pos"), sentences(archive, "neg")
    taken = 0
    for name, count in SHARES.items():
        good, bad = positive[taken : taken + count], negative[taken : taken + count]
        taken += count
        write(folder / f"{name}.jsonl", ROWS[name](good, bad))


def sentences(archive: Path, sign: str) -> list[str]:
    """The distinct sentences of one sign, long enough to be cut, in a seeded order."""
    with zipfile.ZipFile(archive) as files:
        text = files.read(f"sentence_polarity/rt-polarity.{sign}").decode("utf-8")
    found = sorted({" ".join(line.split()) for line in text.splitlines()})
    found = [sentence for sentence in found if len(sentence.split()) >= 2 * WORDS]
    random.Random(sign).shuffle(found)
    return found


def pairs(good: list[str], bad: list[str]) -> Iterable[Mapping[str, str]]:
    """A positive against a negative sentence. The prompt is of no use but must differ: folds are made of prompts."""
    for number, (chosen, rejected) in enumerate(zip(good, bad, strict=True)):
        yield {"prompt": f"Film {number}:", "chosen": chosen, "rejected": rejected}


def continued(good: list[str], bad: list[str]) -> Iterable[Mapping[str, str]]:
    """The first words of each sentence, and the rest."""
    for sentence in mixed(good, bad):
        words = sentence.split()
        yield {"prompt": " ".join(words[:WORDS]), "response": " ".join(words[WORDS:])}


def openings(good: list[str], bad: list[str]) -> Iterable[Mapping[str, str]]:
    """The first words alone, each once."""
    for opening in dict.fromkeys(" ".join(sentence.split()[:WORDS]) for sentence in mixed(good, bad)):
        yield {"prompt": opening}


def mixed(good: list[str], bad: list[str]) -> list[str]:
    """Both signs in turns."""
    return [sentence for both in zip(good, bad, strict=True) for sentence in both]


ROWS = {"gold": pairs, "proxy": pairs, "sft": continued, "prompts": openings}


def write(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python experiments/prepare_polarity.py sentence_polarity.zip")
    main(Path(sys.argv[1]))
