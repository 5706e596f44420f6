"""Figure `matmul`: GFLOP/s of oneDNN and of torch's own product (MKL on x86) at the shapes of SmolLM2's layers.

    python tests/benchmarks/matmul.py [--tokens 1024] [--runs 7]

Float32 on a CPU. For a layer of weight W [out, in] and T tokens: a·bᵀ is its forward (x·Wᵀ), a·b its input's gradient
(g·W), aᵀ·b its weight's gradient (gᵀ·x). The two libraries take turns. "ours" is oneDNN; where the ratio is below 1,
`online_dpo.matmul` leaves the product to torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from figures import Report
from torch import Tensor

from online_dpo import matmul

WEIGHTS = {
    "query, output": (576, 576),
    "key, value": (192, 576),
    "gate, up": (1536, 576),
    "down": (576, 1536),
    "head": (49152, 576),
}
"""[out, in] of SmolLM2-135M's linear layers."""
HEAD_TOKENS = 256
"""Positions that the head scores at once: 64 MiB of logits hold 341."""
Product = Callable[[Tensor, Tensor], Tensor]


def products(tokens: int, out: int, into: int) -> dict[str, tuple[Tensor, Tensor, Product, Product]]:
    """By name: the factors, the product by oneDNN, and by torch."""
    x, g, weight = torch.randn(tokens, into), torch.randn(tokens, out), torch.randn(out, into)
    return {
        "a·bᵀ": (x, weight, matmul._onednn, lambda a, b: a @ b.t()),
        "a·b": (g, weight, lambda a, b: matmul._onednn(a, b.t()), lambda a, b: a @ b),
        "aᵀ·b": (g, x, lambda a, b: matmul._onednn(a.t(), b.t()), lambda a, b: a.t() @ b),
    }


def speeds(a: Tensor, b: Tensor, sides: tuple[Product, Product], flops: int, runs: int) -> list[list[float]]:
    """GFLOP/s of each side in each run; the sides take turns, and one run of each warms up."""
    found: list[list[float]] = [[], []]
    for run in range(runs + 1):
        for side, product in enumerate(sides):
            began = time.perf_counter()
            product(a, b)
            seconds = time.perf_counter() - began
            if run:
                found[side].append(flops / seconds / 1e9)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a pass")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each side, after one that warms up")
    options = parser.parse_args()
    if options.runs < 1 or options.tokens < 1:
        parser.error("--runs and --tokens must be at least 1")
    if not matmul.has_onednn():
        parser.error("this build of torch has no oneDNN")
    report = Report()
    for layer, (out, into) in WEIGHTS.items():
        tokens = min(options.tokens, HEAD_TOKENS) if layer == "head" else options.tokens
        for name, (a, b, ours, theirs) in products(tokens, out, into).items():
            mine, other = speeds(a, b, (ours, theirs), 2 * tokens * out * into, options.runs)
            report.add(f"{name}, {layer} ({out}×{into}), {tokens} tokens", mine, other, "GFLOP/s", "more")
    print(f"\n{report.table()}")


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        main()
