"""Runs inside vLLM's workers: puts a policy's weights into the live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from online_dpo.backends.weights import policy_tensors


class WeightLoader:
    """vLLM mixes this into its worker class (`worker_extension_cls`); `self.model_runner` is the worker's."""

    model_runner: Any

    def take_policy(self, base: str, adapter: str | None) -> None:
        """Load the weights in folder `base`, with the adapter in folder `adapter` merged in, in place.

        Every worker reads the files itself: no tensor crosses a process boundary.
        """
        tensors = policy_tensors(Path(base), None if adapter is None else Path(adapter))
        self.model_runner.reload_weights(weights_iterator=tensors)
        refresh_tied_head(self.model_runner.get_model())


def refresh_tied_head(model: Any) -> None:
    """Let an output head that shares the embedding's weights take the new ones.

    A checkpoint with tied weights has no tensor for the head, so vLLM's reload passes it over; on CPU the head works on
    a packed copy of its weights, which would stay that of the first policy.
    """
    head: Any = getattr(model, "lm_head", None)
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    method = getattr(head, "quant_method", None)
    if not getattr(model.config, "tie_word_embeddings", False) or embedding is None or method is None:
        return
    if head is not embedding:
        head.weight = embedding.weight
    method.process_weights_after_loading(head)
