"""The one model that a learner worker keeps in memory, and the policies whose weights it takes in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from online_dpo.backends import sharding
from online_dpo.backends.adapter import with_adapter
from online_dpo.backends.distributed import from_first, largest, rank_and_world
from online_dpo.backends.forward import Forward, ItemScores, attend_by, attention_of, choose_forward
from online_dpo.backends.hf_model import load_causal_lm, read_causal_lm, set_dropout, silence_dropout, torch_dtype
from online_dpo.backends.stacked_adapter import drop_stacked, load_adapter
from online_dpo.config import LoraSpec
from online_dpo.errors import ConfigError, ModelError
from online_dpo.matmul import quicken
from online_dpo.models import digest_folder, load_tokenizer
from online_dpo.packing import Item
from online_dpo.passes import fill
from online_dpo.scored_text import padding_token
from online_dpo.types import Policy, Probe
from online_dpo.vocabulary_gradients import embed_in_place, lay_out

TOKENS_PER_PASS = {"cpu": 1024, "cuda": 16384}
"""Enough tokens to keep the arithmetic units busy; more would only need more memory."""
SPARE: Item = ((0,), (0,))
"""What a worker scores for nothing, so that all make equally many passes: any model has token 0."""


class PolicyModel:
    """Float32 weights that become any policy of the run; the forward runs in `dtype`.

    With `lora`, the initial model's weights are frozen and a policy is an adapter; the initial policy is the
    adapter as freshly initialised (its B matrices are zero, so it changes nothing).

    `sharded` (`parallel` fsdp, several workers): each worker holds a share of every weight, and every method that runs
    the model or touches its weights is the work of all of them together.
    """

    def __init__(
        self,
        initial: Policy,
        *,
        model_name: str,
        lora: LoraSpec | None = None,
        dtype: str = "auto",
        device: torch.device | None = None,
        parallel: str = "ddp",
        activation_checkpointing: bool = False,
        layout: str = "auto",
        tokens_per_pass: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.initial = initial
        self.rank, self.world = rank_and_world()
        self.sharded = parallel == "fsdp" and self.world > 1
        self.trust_remote_code = trust_remote_code
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch_dtype(dtype, self.device)
        self.lora = lora
        model: Any = read_causal_lm(initial.path, torch.float32, trust_remote_code)
        self.dropout_rates = silence_dropout(model)
        if lora is not None:
            model = with_adapter(model, lora, model_name)
        if activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if lora is not None:
                model.enable_input_require_grads()
            # transformers checkpoints in training mode alone; dropout is zero, so the mode changes nothing else.
            model.train()
        if self.device.type == "cpu":
            quicken(model)
            embed_in_place(model)
        if self.sharded:
            # From the host's memory layer by layer: no GPU ever holds the whole model.
            sharding.shard(model, self.device, self.world)
        self.model: Any = model.to(self.device)
        self.tokens_per_pass = tokens_per_pass or TOKENS_PER_PASS[self.device.type]
        own = attention_of(self.model)
        self.forward = choose_forward(self.model, layout, self.device, self.autocast)
        self._chosen = self.forward, attention_of(self.model)
        self._plain = Forward(False, self.forward.chunked), own
        self._let_go()
        self.loaded: str | None = initial.digest

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that training moves."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def clear_gradients(self, optimiser: torch.optim.Optimizer) -> None:
        """Before a step's first pass."""
        optimiser.zero_grad(set_to_none=True)
        if not self.sharded:
            lay_out(self.model)

    def rest(self) -> None:
        """Move the weights to the host's memory until the next `load`, leaving the GPU to the engine.

        Raises `ConfigError` where the weights are shared out.
        """
        if self.sharded:
            raise ConfigError("learner.parallel: fsdp keeps its shares on the GPU: engine.share_gpu must be false")
        if self.device.type == "cuda":
            self.model.to("cpu")
            torch.cuda.empty_cache()

    def load(self, policy: Policy, seed: int = 0) -> None:
        """Take `policy`'s weights, unless they are here already. `seed` draws a fresh adapter's A matrices."""
        if self.sharded:
            self._let_go()
        else:
            self.model.to(self.device)
        if policy.digest == self.initial.digest and self.lora is not None:
            # Fresh A matrices depend on the seed, so "already here" cannot be told by the digest alone.
            drop_stacked(self.model)
            _reset_adapter(self.model, seed)
        elif policy.digest != self.loaded:
            if self.lora is not None:
                load_adapter(self.model, policy.path)
            else:
                self._copy_from(policy.path)
        self.loaded = policy.digest

    def _copy_from(self, path: Path) -> None:
        if self.sharded and sharding.read_shares(self.model, path):
            return
        other = load_causal_lm(path, torch.float32, self.trust_remote_code)
        for mine, theirs in zip(self.model.parameters(), other.parameters(), strict=True):
            sharding.fill(mine, theirs)

    def save(self, policy_id: str, out: Path, probe_token_ids: Sequence[int]) -> Policy:
        """Save the weights as policy `policy_id` in the empty folder `out`; safetensors only.

        Of workers that hold shares, worker 0 writes what all of them gather.
        """
        if self.sharded:
            state = sharding.whole_state(self.model, trainable_only=self.lora is not None, keep=self.rank == 0)
            digest = from_first(self._write(out, state) if self.rank == 0 else "")
        else:
            digest = self._write(out, None)
        policy = Policy(policy_id, out, digest, adapter=self.lora is not None, probe=self.probe(probe_token_ids))
        self.loaded = policy.digest
        return policy

    def _write(self, out: Path, state: dict[str, Tensor] | None) -> str:
        """Save the weights, or `state` in their place, in `out`; returns the folder's digest."""
        if self.lora is not None:
            # "auto" would ask the hub for a model of the base's name.
            self.model.save_pretrained(out, state_dict=state, safe_serialization=True, save_embedding_layers=False)
        else:
            _make_generation_saveable(self.model)
            # The configuration as it was read: who trains the policy further may want its dropout.
            set_dropout(self.dropout_rates, on=True)
            self.model.save_pretrained(out, state_dict=state, safe_serialization=True)
            set_dropout(self.dropout_rates, on=False)
            load_tokenizer(self.initial.path, self.trust_remote_code).save_pretrained(out)
        return digest_folder(out)

    def autocast(self) -> Any:
        """The forward's precision: the weights are float32, the products are `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        # A cached narrow copy would keep a gathered weight alive until the pass ends.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=not self.sharded)

    def scores(self, items: Sequence[Item]) -> ItemScores:
        """Per-token log-probs of the items' completions in one pass, with gradients."""
        with self.autocast():
            found = self.forward.scores(self.model, items, self.device)
        if not torch.is_grad_enabled():
            self._let_go()
        return found

    @torch.no_grad()
    def per_token(self, items: Sequence[Item]) -> list[list[float]]:
        """Per-token log-probs of each completion, in as many passes as the token budget asks, in the items' order."""
        result: list[list[float]] = [[] for _ in items]
        passes = fill([[item] for item in items], self.tokens_per_pass, packed=self.forward.packed)
        spare = largest(len(passes)) - len(passes) if self.sharded else 0
        for chosen in passes:
            for i, values in zip(chosen, self.scores([items[i] for i in chosen]).each(), strict=True):
                result[i] = values
        for _ in range(spare):
            self.scores([SPARE])
        return result

    def lay_out(self, *, plain: bool) -> None:
        """Compute in the plain layout from now on, or in the one that was chosen at the start."""
        self.forward, attention = self._plain if plain else self._chosen
        attend_by(self.model, attention)

    @cached_property
    def padding(self) -> int:
        """What `dpo.faults.score_padding` fills up with: `scored_text.padding_token`."""
        return padding_token(load_tokenizer(self.initial.path, self.trust_remote_code))

    @contextmanager
    def dropout(self, seed: int) -> Iterator[None]:
        """Inside, the model's own dropout is on, as `model.train()` leaves it elsewhere; `seed` decides its noise.

        The way back belongs inside too: with activation checkpointing layers are run again there. Raises `ModelError`
        for a model that has no dropout, and in the packed layout, whose attention has none.
        """
        if not self.dropout_rates:
            raise ModelError("dpo.faults.dropout: this model has no dropout to leave on")
        if self.forward.packed:
            raise ModelError("dpo.faults.dropout: packed attention has no dropout: the layout must be plain")
        training = self.model.training
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            set_dropout(self.dropout_rates, on=True)
            self.model.train()
            try:
                yield
            finally:
                set_dropout(self.dropout_rates, on=False)
                self.model.train(training)

    def probe(self, token_ids: Sequence[int]) -> Probe:
        """The probe of the weights that are loaded now, in float32 whatever the forward's precision in training.

        It says which weights an engine holds: rounding of the learner's own would only blur that.
        """
        with torch.no_grad():
            [values] = self.forward.scores(self.model, [(token_ids[:1], token_ids[1:])], self.device).each()
        self._let_go()
        return Probe(tuple(token_ids), tuple(values))

    def _let_go(self) -> None:
        if self.sharded:
            sharding.let_go(self.model)


def _make_generation_saveable(model: Any) -> None:
    """Some published models name a temperature but not `do_sample`: loading allows it, saving raises."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def _reset_adapter(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    with sharding.trainable_whole(model):
        for module in model.modules():
            if hasattr(module, "reset_lora_parameters"):
                module.reset_lora_parameters("default", True)
