"""How many operations and bytes the work is, by a model's shape alone.

Kaplan et al. 2020, "Scaling Laws for Neural Language Models", table 1: a multiplication and an addition for each weight
that a token meets (2·N forward), twice that on the way back. Attention adds 2·width for each query's product with a
key and 2·width for the weighted sum, in every layer (Chowdhery et al. 2022, "PaLM", appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

from online_dpo.planner.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Text:
    """Texts that a learner computes. `tokens`: computed, in the packed layout each prompt once; `seen`: pairs of a
    query and a key that it looks at; `scored`: tokens whose log-probs are computed, the only ones with logits."""

    tokens: float
    seen: float
    scored: float

    def __mul__(self, times: float) -> Text:
        return Text(self.tokens * times, self.seen * times, self.scored * times)


def text(prompt: float, completion: float, completions: int, *, packed: bool = True) -> Text:
    """A prompt of so many tokens and `completions` answers to it. Packed the prompt is computed once, else before each.

    Causally T tokens see T(T + 1)/2 keys; c tokens behind a prompt of p see c·p + c(c + 1)/2.
    """
    behind = completion * prompt + _causal(completion)
    prompts = 1 if packed else completions
    return Text(
        tokens=prompts * prompt + completions * completion,
        seen=prompts * _causal(prompt) + completions * behind,
        scored=completions * completion,
    )


def forward_flops(shape: ModelShape, of: Text) -> float:
    """2 · layer weights a token, 4 · width · layers a key seen, 2 · hidden · vocabulary a scored token."""
    return (
        2 * shape.layer_weights * of.tokens
        + 4 * shape.attention_width * shape.layers * of.seen
        + 2 * shape.hidden * shape.vocabulary * of.scored
    )


def training_flops(shape: ModelShape, of: Text, *, frozen: bool = False, checkpointing: bool = False) -> float:
    """3 forwards: the way back computes the gradient of each product's two sides. With `frozen` weights (LoRA) one of
    the two is not needed: 2. `checkpointing` computes the layers once more."""
    return forward_flops(shape, of) * ((2 if frozen else 3) + bool(checkpointing))


def kv_bytes(shape: ModelShape, bytes_a_value: int) -> int:
    """Of one token in the cache: a key and a value, in every layer."""
    return 2 * shape.layers * shape.kv_heads * shape.head_size * bytes_a_value


def _causal(tokens: float) -> float:
    return tokens * (tokens + 1) / 2
