"""A contender of `step.py`: TRL's DPOTrainer, one optimiser step a turn. Started by `turns.Contender`.

The trainer is TRL's own: its precomputation of the reference's log-probs, its `train()`, its collator and loss. What
is added holds it still between turns and reads the clock. Options, for the fastest that it can do on a CPU:

- `precompute_ref_log_probs`: one pass instead of a second model in memory; each batch of it is a turn, and is timed;
- `bf16=False` (its default is True, several times slower on a CPU without bfloat16 units), `optim=adamw_torch_fused`;
- `gradient_checkpointing=False` (its default is True: less memory, a second forward), but for that variant;
- not there on a CPU: `padding_free` (off in this version of TRL), `use_liger_kernel` and Hub kernels (Triton, a GPU).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import turns
from stopwatch import Stopwatch


def config(options: dict[str, Any], folder: str) -> Any:
    """The trainer's options; `variant` is "eager", "checkpointing" or "compiled"."""
    from trl import DPOConfig

    on_gpu = torch.cuda.is_available()
    return DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=options["micro"],
        gradient_accumulation_steps=options["batch"] // options["micro"],
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=options["batch"],
        max_length=None,
        num_train_epochs=1,
        train_sampling_strategy="sequential",  # the same pairs a step as on our side
        learning_rate=options["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=options["dtype"] == "bfloat16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        gradient_checkpointing=options["variant"] == "checkpointing",
        torch_compile=options["variant"] == "compiled",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def trainer_class(floor: turns.Floor) -> Any:
    """DPOTrainer that takes rows of token ids as they are and waits for its turn before each reference batch."""
    from trl import DPOTrainer

    watch = Stopwatch()

    class OnTurn(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            floor.wait()
            watch.start()
            found = super().compute_ref_log_probs(model, inputs)
            floor.tell(watch.stop())
            return found

    return OnTurn


def clock(floor: turns.Floor) -> Any:
    """A callback that waits before each step, and tells what it took: forward, backward, clipping and update."""
    from transformers import TrainerCallback

    watch = Stopwatch()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            floor.wait()
            watch.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            floor.tell(watch.stop())

    return Clock()


def main(options: dict[str, Any], floor: turns.Floor) -> None:
    """First turn: load. Then a turn for each batch of the reference, then one for each step."""
    floor.wait()
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(turns.cores())
    trainer_type = trainer_class(floor)
    rows = json.loads(Path(options["rows"]).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32)
    beside = turns.held_beside(model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dataset = Dataset.from_list(
        [{"prompt_ids": row["prompt"], "chosen_ids": row["chosen"], "rejected_ids": row["rejected"]} for row in rows]
    )
    floor.tell({"beside_mib": beside, "weights": sum(parameter.numel() for parameter in model.parameters())})
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_type(
            model=model,
            args=config(options, folder),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[clock(floor)],
        )
        trainer.train()


if __name__ == "__main__":
    main(turns.options(), turns.Floor())
