"""How much memory the processes need: formulas.

Weights, gradients and AdamW's two moments are float32: 16 bytes a parameter (Rajbhandari et al. 2020, "ZeRO", section
3, counts the same for mixed precision). Activations: Korthikanti et al. 2022, "Reducing Activation Recomputation in
Large Transformer Models", equation 1 without attention's scores, which the fused attention does not keep.
"""

from __future__ import annotations

from dataclasses import dataclass

from online_dpo.planner.operations import kv_bytes
from online_dpo.planner.shape import ModelShape

STATE_BYTES = 16
"""Of a trained parameter: weight, gradient and two moments in float32."""
ACTIVATION_VALUES = 17
"""Values of the hidden size that a layer keeps of a token (34 bytes at 2 bytes a value)."""
LOGIT_BYTES = 2 * 128 * 2**20
"""Of `scored_head`: probabilities that it keeps, and as much for what it computes."""


@dataclass(frozen=True, slots=True)
class LearnerMemory:
    """One worker. `trained`: parameters with a gradient (an adapter's, with LoRA). `shards`: workers that share
    weights (1: each holds all). `tokens`: of one pass. `value_bytes`: 4, or 2 for a bfloat16 forward."""

    shape: ModelShape
    trained: int
    shards: int
    tokens: int
    value_bytes: int
    checkpointing: bool

    @property
    def states(self) -> float:
        """Weights, gradients and moments: 16 bytes a trained parameter, 4 a frozen one, by share."""
        frozen = 0 if self.trained == self.shape.parameters else self.shape.parameters
        return (STATE_BYTES * self.trained + 4 * frozen) / self.shards

    @property
    def gathered(self) -> float:
        """Whole weights beside the shares: two layers (one computed, one on its way), embeddings and head; and the
        narrow copies that a bfloat16 pass keeps of all weights where activations are not computed again."""
        whole = 4 * (2 * self.shape.layer + self.shape.outside) if self.shards > 1 else 0
        narrow = self.shape.layer if self.checkpointing else self.shape.parameters
        return whole + (2 * narrow if self.value_bytes == 2 else 0)

    @property
    def activations(self) -> float:
        """A pass's: 17 · hidden values a token and layer; with checkpointing 1, and one whole layer."""
        layer = ACTIVATION_VALUES * self.shape.hidden * self.tokens * self.value_bytes
        if self.checkpointing:
            return self.shape.layers * self.shape.hidden * self.tokens * self.value_bytes + layer
        return self.shape.layers * layer

    @property
    def total(self) -> float:
        """All of it."""
        return self.states + self.gathered + self.activations + LOGIT_BYTES


def decoding_bytes(shape: ModelShape, rows: int, tokens: int, value_bytes: int) -> float:
    """The transformers engine: weights, keys and values of `rows` sequences of so many tokens, and four copies of their
    logits (as computed, in float32, as probabilities, sorted)."""
    cache = rows * tokens * kv_bytes(shape, value_bytes)
    return value_bytes * shape.parameters + cache + 4 * 4 * rows * shape.vocabulary
