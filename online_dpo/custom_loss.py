"""A loss of the user's own: found by its dotted path, tried once on a few pairs, its output checked at every call."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from online_dpo.dpo_spec import LossSpec
from online_dpo.errors import ConfigError, JudgeError, TrainingError, nearest, one_line
from online_dpo.judging.digests import source_digest
from online_dpo.judging.importing import import_object
from online_dpo.losses import LogRatios

TRIAL = LogRatios(torch.tensor([0.0, 0.25, -2.0]), torch.tensor([0.0, -0.25, 1.0]))
"""Where every run begins (policy = reference), and a pair on either side of it."""


class CustomLoss:
    """`function(ratios, beta, **params)` of `spec`: LogRatios to one loss a pair, shape [pairs].

    `folders`: where its module is looked for after Python's own path. `digest`: SHA-256 (hex) of its name and source.
    Raises `ConfigError`, one line, when there is no such function or a key is wrong or missing, and `TrainingError`
    when what it returns is no loss of each pair.
    """

    def __init__(self, spec: LossSpec, beta: float, folders: Sequence[Path] = ()) -> None:
        self.name = spec.use
        self.beta = beta
        self.params = spec.params
        try:
            self.function: Callable[..., Any] = import_object(spec.use, folders, what="loss")
            source = source_digest(spec.use, folders)
        except JudgeError as error:
            raise ConfigError(str(error)) from error
        _check_params(spec, self.function)
        self.digest = hashlib.sha256(json.dumps([spec.use, source]).encode()).hexdigest()
        self._try()

    def __call__(self, r: LogRatios) -> Tensor:
        """The loss of each pair, [pairs]; `TrainingError` when it has another shape, no gradient, or is not finite."""
        try:
            losses = self.function(r, self.beta, **self.params)
        except Exception as error:
            raise TrainingError(f"loss '{self.name}' failed: {one_line(error)}") from error
        if not isinstance(losses, Tensor):
            raise TrainingError(f"loss '{self.name}' returned a {type(losses).__name__}, not a tensor [pairs]")
        if losses.shape != r.r_w.shape:
            raise TrainingError(
                f"loss '{self.name}' returned shape {list(losses.shape)} for {len(r.r_w)} pairs: "
                "one loss a pair is expected, no mean or sum"
            )
        if torch.is_grad_enabled() and r.r_w.requires_grad and not losses.requires_grad:
            raise TrainingError(f"loss '{self.name}' has no gradient: it must be computed from the log-ratios by torch")
        if not bool(torch.isfinite(losses).all()):
            raise TrainingError(f"loss '{self.name}' returned a value that is not finite")
        return losses

    def _try(self) -> None:
        """One call on `TRIAL`, so that a fault shows before anything is sampled."""
        with torch.enable_grad():
            r = LogRatios(*(part.clone().requires_grad_() for part in TRIAL))
            values = self(r)
            gradients = torch.autograd.grad(values.sum(), r, allow_unused=True)
            alone = self(LogRatios(r.r_w[:1], r.r_l[:1]))
        if not torch.allclose(alone, values[:1]):
            # A step's pairs are cut into passes and dealt to workers: only a sum over pairs is the same however cut.
            raise TrainingError(f"loss '{self.name}' of a pair depends on the other pairs: each must stand alone")
        found = [gradient for gradient in gradients if gradient is not None]
        if not found:
            raise TrainingError(f"loss '{self.name}' has no gradient: it does not depend on the log-ratios")
        if not all(bool(torch.isfinite(gradient).all()) for gradient in found):
            raise TrainingError(f"loss '{self.name}' has a gradient that is not finite")


def _check_params(spec: LossSpec, function: Callable[..., Any]) -> None:
    """Name what is no function of (ratios, beta, ...), and a wrong or missing key, more clearly than Python does."""
    if not callable(function):
        raise ConfigError(f"loss '{spec.use}' is a {type(function).__name__}, not a function")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C: the trial must tell
        return
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ConfigError(f"loss '{spec.use}' must take the log-ratios and beta: def name(ratios, beta, ...)")
    given = {p.name for p in positional[:2]}
    own = [p for p in parameters if p.name not in given and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [p.name for p in own]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in spec.params:
        if key in given or (key not in known and not open_ended):
            hint = nearest(key, known) or (f"; known: {', '.join(known)}" if known else "; it takes no keys")
            raise ConfigError(f"loss '{spec.use}': unknown key '{key}'{hint}")
    for parameter in own:
        if parameter.default is parameter.empty and parameter.name not in spec.params:
            raise ConfigError(f"loss '{spec.use}': key '{parameter.name}' is missing")
