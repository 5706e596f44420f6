"""The settings of training a reward model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from online_dpo.config import DPOSpec
from online_dpo.errors import ConfigError
from online_dpo.key_faults import describe
from online_dpo.spec import Fraction, Positive, Spec

FULL_LR = 1e-5
LORA_LR = 2e-4


class RewardSpec(Spec):
    """One step is `batch_size` pairs, whatever the micro-batch and the number of workers."""

    epochs: Positive = 1
    lr: Annotated[float, Field(gt=0.0)] | None = Field(default=None, description="default: 1e-5; with LoRA 2e-4")
    batch_size: Positive = 32
    micro_batch_size: Positive = Field(default=4, description="pairs of one forward, on one worker")
    max_length: Positive | None = Field(default=None, description="tokens; pairs with a longer text are left out")
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(default=0.1, description="share of the prompts")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    workers: Positive = 1
    threads: Positive | None = Field(default=None, description="CPU threads a worker; default: cores / workers")
    lora_rank: Positive | None = Field(default=None, description="train an adapter of this rank, merged on saving")
    centre: Annotated[float, Field(ge=0.0)] = Field(default=0.01, description="λ of `losses.bradley_terry`")
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    warmup: Fraction = 0.1

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.lr if self.lr is not None else (LORA_LR if self.lora_rank else FULL_LR)

    def steps(self) -> DPOSpec:
        """What the optimiser and the order of batches need to know; the rate falls linearly after its warm-up."""
        return DPOSpec(
            lr=self.rate,
            batch_size=self.batch_size,
            epochs=self.epochs,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            schedule="linear",
        )


def reward_spec(**settings: Any) -> RewardSpec:
    """A `RewardSpec`; `ConfigError`, one line, for a value that is none."""
    try:
        return RewardSpec.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"judge train: {describe(error, RewardSpec)}") from error
