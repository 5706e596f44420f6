"""What a linear reward sees of a prompt and an answer: weighted words and letters, what is taken over, embeddings.

Nothing here is a pickle: a folder holds terms as JSON and numbers as safetensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_dpo.errors import JudgeError, one_line

Texts = Sequence[tuple[str, str]]
"""(the prompt's last message, the answer) each."""
Floats = NDArray[np.float64]

START, END = "\x02", "\x03"
"""Stand before and after the text as tokens of their own: how an answer opens and closes is told from what it holds."""
MOST_LETTERS = 20_000
BATCH = 16


@dataclass(frozen=True)
class Features:
    """φ(x, y), block by block, each divided by its `scales` entry.

    `words`: TF-IDF of the answer's words, punctuation marks and pairs of these. `letters` (or None): TF-IDF of 2 to 4
    neighbouring characters within words. `overlap`: the shares of the answer's words and word pairs that the prompt
    has. `encoder` (or None): embeddings. Term counts enter as 1 + ln count; each TF-IDF block has length 1.
    """

    words: Any
    letters: Any | None
    encoder: Encoder | None
    scales: Mapping[str, float]

    def matrix(self, texts: Texts) -> Any:
        """Shape (texts, columns), a sparse float64 matrix in rows."""
        from scipy import sparse

        blocks = self.blocks(texts)
        return sparse.hstack([block / self.scales[name] for name, block in blocks.items()], format="csr")

    def blocks(self, texts: Texts) -> dict[str, Any]:
        """The blocks before they are scaled, in the order of the columns."""
        from scipy import sparse

        answers = [answer for _, answer in texts]
        blocks = {"words": self.words.transform(answers)}
        if self.letters is not None:
            blocks["letters"] = self.letters.transform(answers)
        blocks["overlap"] = sparse.csr_matrix(np.array([overlap(*text) for text in texts]).reshape(-1, 2))
        if self.encoder is not None:
            blocks["encoder"] = sparse.csr_matrix(self.encoder.embed(texts))
        return blocks

    def state(self) -> tuple[dict[str, Any], dict[str, Floats]]:
        """(what JSON holds, what safetensors holds): enough for `from_state`."""
        vectorisers = {"words": self.words} | ({"letters": self.letters} if self.letters is not None else {})
        described = {
            "terms": {name: list(one.get_feature_names_out()) for name, one in vectorisers.items()},
            "scales": dict(self.scales),
            "encoder": self.encoder.digest if self.encoder is not None else None,
        }
        return described, {f"idf.{name}": np.asarray(one.idf_, np.float64) for name, one in vectorisers.items()}

    @classmethod
    def from_state(
        cls, described: Mapping[str, Any], numbers: Mapping[str, Floats], encoder: Encoder | None
    ) -> Features:
        """The features that `state` described; the encoder must be the one they were fitted with."""
        wanted = described["encoder"]
        if wanted != (encoder.digest if encoder is not None else None):
            raise JudgeError(
                "it was fitted with another encoder than 'encoder' names"
                if wanted and encoder
                else "it was fitted with an encoder: name its folder as 'encoder'"
                if wanted
                else "it was fitted without an encoder: leave out 'encoder'"
            )
        terms, scales = described["terms"], {name: float(scale) for name, scale in described["scales"].items()}
        words = _restored(word_vectoriser(terms["words"]), numbers["idf.words"])
        letters = None
        if "letters" in terms:
            letters = _restored(letter_vectoriser(terms["letters"]), numbers["idf.letters"])
        return cls(words, letters, encoder, scales)


def fit_features(chosen: Texts, rejected: Texts, *, min_df: int, letters: bool, encoder: Encoder | None) -> Features:
    """Terms and their weights from all these answers; scales that make the blocks' differences equally large.

    Each scale is the root mean square of |φ(x, chosen) − φ(x, rejected)| over the pairs. No choice is looked at.
    Raises `ValueError`, scikit-learn's own, when no term is in `min_df` answers.
    """
    answers = [answer for _, answer in (*chosen, *rejected)]
    words = word_vectoriser(min_df=min_df).fit(answers)
    letter = letter_vectoriser(min_df=min_df).fit(answers) if letters else None
    raw = Features(words, letter, encoder, {})
    first, second = raw.blocks(chosen), raw.blocks(rejected)
    scales = {name: float(np.sqrt((first[name] - second[name]).power(2).sum() / len(chosen))) or 1.0 for name in first}
    return Features(words, letter, encoder, scales)


def word_vectoriser(vocabulary: Sequence[str] | None = None, *, min_df: int = 1) -> Any:
    """An unfitted vectoriser of words, marks and pairs of them; `vocabulary` fixes its terms and their order."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        preprocessor=framed,
        token_pattern=r"\w+|[^\w\s]",  # noqa: S106 (no password)
        ngram_range=(1, 2),
        sublinear_tf=True,
        min_df=min_df,
        vocabulary=vocabulary,
    )


def letter_vectoriser(vocabulary: Sequence[str] | None = None, *, min_df: int = 1) -> Any:
    """An unfitted vectoriser of 2 to 4 neighbouring characters within words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        analyzer="char_wb",
        ngram_range=(2, 4),
        sublinear_tf=True,
        min_df=min_df,
        max_features=None if vocabulary else MOST_LETTERS,
        vocabulary=vocabulary,
    )


def framed(text: str) -> str:
    """`text` in lower case between the two marks for its start and end."""
    return f"{START} {text.lower()} {END}"


def overlap(question: str, answer: str) -> tuple[float, float]:
    """The shares of the answer's words, and of its pairs of neighbouring words, that are in the question too."""
    asked, said = question.lower().split(), answer.lower().split()
    asked_pairs, said_pairs = set(pairwise(asked)), list(pairwise(said))
    known = set(asked)
    return (
        sum(word in known for word in said) / max(len(said), 1),
        sum(pair in asked_pairs for pair in said_pairs) / max(len(said_pairs), 1),
    )


def _restored(vectoriser: Any, idf: Floats) -> Any:
    vectoriser.idf_ = idf
    return vectoriser


# --- embeddings ---


class Encoder:
    """The mean of a transformer's last hidden states over the text's tokens, at length 1.

    `folder` is a Hugging Face folder with safetensors weights. The text is the question and the answer; what is too
    long for the model loses its beginning. `keep` remembers every embedding: for a fit, which asks for the same ones
    again. Runs on CPU in float32.
    """

    def __init__(self, folder: str, *, keep: bool = False) -> None:
        path = Path(folder).expanduser()
        if not (path / "config.json").is_file():
            raise JudgeError(f"encoder '{folder}': not a folder with a Hugging Face model (no config.json)")
        self.folder = path
        self.digest = _digest(path)
        self._known: dict[tuple[str, str], Floats] | None = {} if keep else None
        self._model: tuple[Any, Any, int] | None = None

    def embed(self, texts: Texts) -> Floats:
        """Shape (texts, hidden size)."""
        known = self._known if self._known is not None else {}
        new = sorted(set(texts) - known.keys(), key=lambda text: len(text[0]) + len(text[1]))
        for start in range(0, len(new), BATCH):  # like lengths together waste little padding
            batch = new[start : start + BATCH]
            known.update(zip(batch, self._pooled(batch), strict=True))
        return np.stack([known[text] for text in texts])

    def _pooled(self, texts: Texts) -> Floats:
        import torch

        tokenizer, model, longest = self._load()
        ids = [tokenizer(f"{question}\n\n{answer}")["input_ids"][-longest:] or [0] for question, answer in texts]
        width = max(len(one) for one in ids)
        tokens = torch.tensor([[*one, *[0] * (width - len(one))] for one in ids])
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids])
        with torch.no_grad():
            states = model(input_ids=tokens, attention_mask=mask).last_hidden_state.double()
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        pooled: Floats = torch.nn.functional.normalize(mean, dim=1).numpy()
        return pooled

    def _load(self) -> tuple[Any, Any, int]:
        if self._model is None:
            import torch
            from transformers import AutoModel, AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
                model = AutoModel.from_pretrained(
                    str(self.folder), local_files_only=True, use_safetensors=True, dtype=torch.float32
                ).eval()
            except Exception as error:  # the libraries' errors share no base class
                raise JudgeError(f"encoder '{self.folder}' cannot be loaded: {one_line(error)}") from error
            limit = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
            self._model = tokenizer, model, int(min(limit, tokenizer.model_max_length))
        return self._model


def _digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the folder's configuration, tokenizer and weights."""
    total = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".model", ".txt"}):
        with file.open("rb") as stream:
            total.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
