"""An adapter of another rank than the trained one: an average of adapters, which only a reference is.

It is put beside the trained adapter and made the active one; dropping it puts the trained one back. The base weights
are never written to, so nothing has to be restored and no copy of them is held: the cost is the stacked matrices'
own memory, and only while they are loaded.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from online_dpo.backends.sharding import shared_out
from online_dpo.errors import ModelError

TRAINED = "default"
STACKED = "stacked"


def load_adapter(model: Any, path: Path) -> None:
    """Give peft model `model` the adapter in folder `path`, in the trained one's place where the ranks are equal.

    Raises `ModelError` when it adapts modules that the model does not.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    drop_stacked(model)
    saved = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    name = TRAINED
    if saved["r"] != model.peft_config[TRAINED].r:
        name = STACKED
        config = copy.deepcopy(model.peft_config[TRAINED])
        config.r, config.lora_alpha = saved["r"], saved["lora_alpha"]
        model.add_adapter(STACKED, config)
        model.set_adapter(STACKED)
    tensors = load_file(path / "adapter_model.safetensors")
    if name == TRAINED:
        tensors = shared_out(tensors, model)
    outcome = set_peft_model_state_dict(model, tensors, adapter_name=name)
    if outcome.unexpected_keys:
        drop_stacked(model)
        raise ModelError(f"the adapter in {path} does not fit the model: unexpected {outcome.unexpected_keys[0]}")


def drop_stacked(model: Any) -> None:
    """Make the trained adapter the active one again, as it was; nothing to do where no other was loaded."""
    if STACKED in model.peft_config:
        model.set_adapter(TRAINED)
        model.delete_adapter(STACKED)
