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
