"""What several tests share: the real data beside the repository, small real models, really sampled pairs.

Nothing heavy is imported until a test asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from online_dpo.types import Candidate, Pair, Policy, Prompt

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

PROMPTS = (
    "Once upon a time",
    "Tom had a red ball.",
    "The dog",
    "Lily and her mum went to the park",
    "One day, a bird",
    "It was a very cold night and",
)
LENGTHS = ((9, 4), (5, 12), (7, 7), (14, 3), (3, 8), (11, 10))
"""Most tokens of each prompt's chosen and rejected answer: no two pairs are padded alike."""


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Inputs and outputs (float64) of the DPO authors' own loss and log-prob functions."""
    file = SHARED / "golden" / "dpo_reference_loss.json"
    if not file.is_file():
        pytest.skip("the DPO authors' reference figures (../shared/data/golden) are not on this machine")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="session")
def stories() -> Path:
    """The trained 260 K-parameter Llama of ../shared/data."""
    folder = SHARED / "models" / "stories260k"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the model stories260k (../shared/data/models) is not on this machine")
    return folder


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Models this small run fastest, and the same way every time, on one thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(one_thread: None) -> Callable[[str, Path], Path]:
    """`tiny_model(architecture, folder)`: a random model of 2 layers saved with a byte tokenizer in `folder`.

    Weights are drawn wide enough (standard deviation 0.2) for next-token distributions far from uniform: with the
    usual 0.02 every token would score −ln V and hardly any mistake would show.
    """

    def make(architecture: str, folder: Path) -> Path:
        import torch
        from transformers import AutoModelForCausalLM

        tokenizer = byte_tokenizer()
        torch.manual_seed(sum(architecture.encode()))
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, len(tokenizer)))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def byte_tokenizer() -> Any:
    """One token a byte, after <pad> 0, <s> 1 and </s> 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_config(architecture: str, vocabulary: int) -> Any:
    """The configuration of a 2-layer model; what is particular to each architecture is switched on."""
    import transformers

    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common = tokens | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    if architecture == "gpt2":
        return transformers.GPT2Config(
            **tokens, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
        )  # fmt: skip
    if architecture == "opt":
        return transformers.OPTConfig(
            **tokens, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128, init_std=0.2, dropout=0.1, layerdrop=0.5,
        )  # fmt: skip
    if architecture == "falcon":
        return transformers.FalconConfig(
            **tokens, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2,
            hidden_dropout=0.1, attention_dropout=0.1,
        )  # fmt: skip
    if architecture not in LIKE_LLAMA:
        raise ValueError(architecture)
    model_type, particular = LIKE_LLAMA[architecture]
    return transformers.AutoConfig.for_model(model_type, **common | particular)


# The windows are shorter than most prompts of the tests, and than prompt and completion together. Caps of 2 and 3 bend
# scores and logits of size 1 to 3: without them log-probs are far off.
LIKE_LLAMA: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral": ("mistral", {"sliding_window": 5}),
    # Layer 0 sees everything, layer 1 three tokens.
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2_capped": (
        "gemma2",
        {
            "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi": ("phi", {"resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {}),
    # Scale the logits after the head.
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 3.0}),
    # Cannot be packed: positions by a bias, an extra term in the softmax, a window that the mask alone knows, no
    # attention at all.
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "gpt_oss": ("gpt_oss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 5}),
    "phimoe": ("phimoe", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 64}),
    "mamba": ("mamba", {"state_size": 4}),
}  # fmt: skip
"""Model type, and what is switched on, of architectures whose sizes have the same names as Llama's."""


@pytest.fixture(scope="session")
def tiny_lm(one_thread: None) -> Callable[[str], Any]:
    """`tiny_lm(architecture)`: a fresh random model as `tiny_model`'s, in memory, as a learner loads one."""

    def make(architecture: str) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        from online_dpo.backends.hf_model import silence_dropout

        torch.manual_seed(sum(architecture.encode()))
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, VOCABULARY))
        silence_dropout(model)
        return model.eval()

    return make


VOCABULARY = 259
"""Of the byte tokenizer."""


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[[str, Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama with a byte tokenizer. Read only: the whole test run shares it."""
    return tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def small_model(request: pytest.FixtureRequest) -> Path:
    """stories260k where it is, else the tiny Llama. Read only."""
    name = "stories" if (SHARED / "models" / "stories260k" / "model.safetensors").is_file() else "tiny_llama"
    folder: Path = request.getfixturevalue(name)
    return folder


@pytest.fixture(scope="session")
def prompts(small_model: Path) -> list[Prompt]:
    """Six prompts of different lengths, tokenised for `small_model`, the begin token once."""
    return tokenised(small_model, PROMPTS)


def tokenised(folder: Path, texts: tuple[str, ...]) -> list[Prompt]:
    """`texts` as prompts for the model in `folder`."""
    from online_dpo.models import load_tokenizer
    from online_dpo.types import Message

    tokenizer: Any = load_tokenizer(folder)
    return [
        Prompt(
            id=f"p{number}",
            messages=(Message("user", text),),
            token_ids=(tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]),
        )
        for number, text in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def initial(small_model: Path, one_thread: None) -> Policy:
    """`small_model` as a run's initial policy, with its probe."""
    from online_dpo.backends.policy_model import PolicyModel
    from online_dpo.models import digest_folder

    bare = Policy("initial", small_model, digest_folder(small_model))
    ids = tokenised(small_model, ("There was a little girl named Lily.",))[0].token_ids
    probe = PolicyModel(bare, model_name="small").probe(ids)
    return Policy(bare.id, bare.path, bare.digest, probe=probe)


@pytest.fixture(scope="session")
def pairs(initial: Policy, prompts: list[Prompt]) -> list[Pair]:
    """One pair a prompt, both answers sampled from `initial` by the transformers engine; no judge was asked."""
    from online_dpo.backends.hf_engine import TransformersEngine
    from online_dpo.config import EngineSpec, SamplingSpec
    from online_dpo.protocols import SampleRequest

    engine = TransformersEngine(initial, EngineSpec())
    engine.load(initial)

    def sample(prompt: Prompt, seed: int, tokens: int) -> Candidate:
        [[candidate]] = engine.sample([SampleRequest(prompt, (seed,))], SamplingSpec(n=1, max_tokens=tokens))
        return candidate

    made = []
    for number, (prompt, (longest_w, longest_l)) in enumerate(zip(prompts, LENGTHS, strict=True)):
        chosen = sample(prompt, 100 + number, longest_w)
        rejected = sample(prompt, 200 + number, longest_l)
        made.append(Pair(prompt, chosen, rejected, chosen_score=1.0, rejected_score=0.0))
    return made


@pytest.fixture
def moved(initial: Policy, tmp_path: Path) -> Callable[..., Policy]:
    """`moved(seed, lora=...)`: another policy, `initial` with every trainable weight moved by seeded noise, saved."""

    def make(seed: int = 1, lora: Any = None, scale: float = 0.05) -> Policy:
        import torch

        from online_dpo.backends.policy_model import PolicyModel
        from online_dpo.policies import write_policy

        assert initial.probe is not None
        model = PolicyModel(initial, model_name="small", lora=lora)
        model.load(initial, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.trainable:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        policy = model.save(f"moved-{seed}", tmp_path / f"moved-{seed}", initial.probe.token_ids)
        write_policy(policy)
        return policy

    return make
