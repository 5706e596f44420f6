"""The settings of the loss and its optimiser. Which key belongs to which loss is checked here: none is ignored."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, field_validator, model_validator

from online_dpo.errors import nearest
from online_dpo.faults_spec import FaultsSpec
from online_dpo.spec import DOTTED, Fraction, Positive, Spec

LossName = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "simpo",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "sppo",
    "aot",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
LOSS_NAMES: tuple[str, ...] = get_args(LossName)

CHOSEN_ALONE = ("sft",)
"""Losses of the chosen answers alone: the rejected ones are not computed, and no key that compares the two is read."""
PAIR_LOSSES = tuple(name for name in LOSS_NAMES if name not in CHOSEN_ALONE)

READ_BY: dict[str, tuple[str, ...]] = {
    "label_smoothing": ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot"),
    "simpo_gamma": ("simpo",),
    "discopop_tau": ("discopop",),
    "bco_running_mean": ("bco_pair",),
}
"""Keys that only some losses read, and which."""

NORMALISED = ("sigmoid_norm", "simpo", "sft")
"""Losses that are defined on averaged log-probs."""

MODIFIERS = (
    "nll_weight",
    "dpop_lambda",
    "length_penalty",
    "ld_alpha",
    "wpo_weight",
    "importance_clip",
    "xpo_alpha",
)
"""Keys that combine with any loss of pairs."""

REFERENCE_FREE = ("simpo", "sft")
"""Losses of the policy's own log-probs."""

NonNegative = Annotated[float, Field(ge=0.0)]
AboveZero = Annotated[float, Field(gt=0.0)]


class LossSpec(Spec):
    """A loss of the user's own: `use` is "module:function"; every other key goes to the function by name."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    use: str

    @field_validator("use")
    @classmethod
    def _dotted(cls, value: str) -> str:
        if not re.fullmatch(DOTTED, value):
            raise ValueError('a loss of your own is named as "module:function", for example "my_loss:cautious"')
        return value

    @property
    def params(self) -> dict[str, Any]:
        """The function's keyword arguments."""
        return dict(self.model_extra or {})


class DPOSpec(Spec):
    """The loss and its optimiser. One step is `batch_size` pairs, whatever the passes it is cut into."""

    loss: LossName | LossSpec = "sigmoid"
    beta: AboveZero = 0.1
    length_normalize: bool | None = Field(
        default=None, description="log-ratios divided by the completion's length; ipo must say; default false"
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        default=0.0, description="share of labels taken to be flipped: " + ", ".join(READ_BY["label_smoothing"])
    )
    simpo_gamma: NonNegative = Field(default=0.5, description="simpo: γ, the margin itself (the paper's γ/β times β)")
    discopop_tau: AboveZero = Field(default=0.05, description="discopop: temperature of the mixture")
    bco_running_mean: bool = Field(default=False, description="bco_pair: δ is the running mean of the rewards, else 0")
    nll_weight: NonNegative = Field(default=0.0, description="α of + α·NLL(chosen)/length")
    dpop_lambda: NonNegative = Field(default=0.0, description="λ against a chosen answer below the reference")
    length_penalty: NonNegative = Field(default=0.0, description="α: a longer chosen answer is pushed less")
    ld_alpha: Fraction | None = Field(default=None, description="weight of tokens past the pair's shared length")
    wpo_weight: bool = Field(default=False, description="pairs weigh by their probability under the policy")
    importance_clip: AboveZero | None = Field(
        default=None, description="pairs weigh π/μ of both answers, at most this; μ: the policy that sampled them"
    )
    xpo_alpha: NonNegative = Field(default=0.0, description="α of + α·log π(answers drawn from the reference)")
    faults: FaultsSpec = Field(
        default=FaultsSpec(), description="what a first script often gets wrong, switched on to see what it costs"
    )
    lr: AboveZero = 1e-6
    batch_size: Positive = 32
    epochs: Positive = 1
    warmup: Fraction = Field(default=0.1, description="share of the round's steps")
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: NonNegative = 0.0
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    clip: AboveZero = 1.0
    engine_gap_tolerance: NonNegative | None = Field(
        default=None,
        description="largest per-token gap at which the engine's log-probs serve as the reference's; "
        "default 1e-3 in float32, 0.05 in bfloat16",
    )

    @field_validator("loss", mode="before")
    @classmethod
    def _name_or_own(cls, value: Any) -> Any:
        """`loss: "module:function"` is short for `loss: {use: "module:function"}`."""
        if isinstance(value, str) and ":" in value:
            return {"use": value}
        if isinstance(value, str) and value not in LOSS_NAMES:
            near = nearest(value, LOSS_NAMES)
            raise ValueError(f'no loss of this name{near}; losses: {", ".join(LOSS_NAMES)}, or "module:function"')
        if not isinstance(value, (str, dict, LossSpec)):
            raise ValueError(f"a loss's name or a mapping with `use` is expected; losses: {', '.join(LOSS_NAMES)}")
        return value

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> DPOSpec:
        for key, losses in READ_BY.items():
            if self.loss_name not in losses and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"loss '{self.loss_name}' does not read '{key}': leave it out (it is read by {', '.join(losses)})"
                )
        if self.loss_name in REFERENCE_FREE and self.dpop_lambda:
            raise ValueError(f"'dpop_lambda' compares with the reference; loss '{self.loss_name}' has none")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss 'exo_pair' takes the logarithm of 'label_smoothing': give one above 0, as 1e-3")
        return self

    @model_validator(mode="after")
    def _no_comparing(self) -> DPOSpec:
        if not self.chosen_alone:
            return self
        for key in ("beta", *MODIFIERS):
            default = type(self).model_fields[key].default
            if getattr(self, key) != default:
                away = "" if default is None else f", or at its default {default}"
                raise ValueError(
                    f"loss '{self.loss_name}' is of chosen answers alone and does not read '{key}': leave it out{away}"
                )
        return self

    @model_validator(mode="after")
    def _faults_have_an_effect(self) -> DPOSpec:
        faults = self.faults
        if faults.on and self.chosen_alone:
            raise ValueError(
                f"dpo.faults are those of losses of pairs; loss '{self.loss_name}' is none: leave them out"
            )
        if faults.of_text and self.importance_clip is not None:
            raise ValueError(
                "'importance_clip' weighs by log-probs that were stored at sampling, of completions alone: it does not "
                "go with faults.score_prompt or faults.score_padding"
            )
        for key in ("ld_alpha", "length_penalty"):
            if faults.score_padding and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"'{key}' compares lengths, and faults.score_padding makes them equal: leave one out")
        return self

    @model_validator(mode="after")
    def _summed_or_averaged(self) -> DPOSpec:
        if self.loss == "ipo" and self.length_normalize is None:
            raise ValueError(
                "loss 'ipo' needs 'length_normalize' said: under this name two trainers of one library (TRL) differ, "
                "its DPO trainer averages log-probs (true), its online one sums them (false)"
            )
        if self.loss_name in NORMALISED and self.length_normalize is False:
            raise ValueError(f"loss '{self.loss_name}' is defined on averaged log-probs: leave 'length_normalize' out")
        return self

    @property
    def loss_name(self) -> str:
        """The loss's name; of one's own, "module:function"."""
        return self.loss.use if isinstance(self.loss, LossSpec) else self.loss

    @property
    def averaged(self) -> bool:
        """Whether the loss sees averaged log-ratios (each divided by its completion's length), not sums."""
        return self.loss_name in NORMALISED or bool(self.length_normalize)

    @property
    def chosen_alone(self) -> bool:
        """Whether the loss is of the chosen answers alone."""
        return self.loss_name in CHOSEN_ALONE

    def describe_loss(self) -> str:
        """One line: the loss, β, summed or averaged log-probs, every key that changes it with its value, faults."""
        if self.chosen_alone:
            return f"{self.loss_name} on the chosen answers, averaged log-probs"
        params = self.loss.params if isinstance(self.loss, LossSpec) else {}
        own = f" ({', '.join(f'{key} {value}' for key, value in params.items())})" if params else ""
        parts = [
            f"{self.loss_name}{own}",
            f"beta {self.beta:g}",
            f"{'averaged' if self.averaged else 'summed'} log-probs",
        ]
        read = [key for key, losses in READ_BY.items() if self.loss_name in losses]
        for key in [*read, *MODIFIERS]:
            value = getattr(self, key)
            if value is True:
                parts.append(key)
            elif value is not None and (value or key == "ld_alpha"):
                parts.append(f"{key} {value:g}")
        if self.faults.on:
            parts.append(f"FAULTS SWITCHED ON: {self.faults.describe()}")
        return ", ".join(parts)
