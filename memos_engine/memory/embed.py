"""Text to unit vectors: all-MiniLM-L6-v2 where it was pulled, hashed n-grams where it was not."""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from memos_engine.errors import ModelFilesError, UnsupportedModelError
from memos_engine.models import read_manifest, resolve
from memos_engine.models.files import sha256_file

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]


@runtime_checkable
class Embedder(Protocol):
    """Anything that turns texts into vectors. Vectors of different `model_id` are never compared."""

    @property
    def model_id(self) -> str:
        """Identifies method and weights by content, so that stored vectors are not mixed."""

    @property
    def dim(self) -> int:
        """Length of a vector."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """`[len(texts), dim]` float32, every row of Euclidean length 1."""


def normalise(vectors: npt.NDArray[np.floating[Any]]) -> Vectors:
    """Rows scaled to length 1, as float32. A zero row becomes the first unit vector, never NaN."""
    rows = np.array(vectors, dtype=np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows[length[:, 0] == 0, 0] = 1.0
    return np.asarray(rows / np.where(length == 0, 1.0, length), dtype=np.float32)


def _checked(texts: Sequence[str]) -> list[str]:
    """A list of encodable texts: lone surrogates, which no tokenizer takes, become question marks."""
    if isinstance(texts, str):
        raise TypeError("embed() takes a list of texts, not one text; write embed([text])")
    return [text.encode("utf-8", "replace").decode("utf-8") for text in texts]


# -- the default ---------------------------------------------------------------------------------


class MiniLMEmbedder:
    """A sentence encoder in the manner of all-MiniLM-L6-v2: mean over tokens, then normalised.

    Texts beyond 256 tokens are cut, as that model was trained. Torch is imported when the first object is
    made. `threads` limits torch's threads during `embed` (None: as they are).
    Source of the method: Reimers and Gurevych, Sentence-BERT, arXiv 1908.10084.
    """

    max_tokens = 256
    batch = 32

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        """`path` is a Hugging Face folder (`resolve("minilm")`). Raises ModelFilesError where it is not."""
        import torch
        from tokenizers import Tokenizer

        from memos_engine.memory.bert import BertEncoder

        folder = Path(path)
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise ModelFilesError(f"{folder} has no model.safetensors; run `memos-engine models pull minilm`")
        manifest = read_manifest(folder)
        digest = manifest.sha256(weights.name) if manifest else sha256_file(weights)
        self.model_id = f"all-MiniLM-L6-v2:mean:{self.max_tokens}:{digest[:16]}"
        self.threads = threads
        self._torch = torch
        self._lock = threading.Lock()  # fast tokenizers keep their truncation state in the object
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(self.max_tokens)
        self._tokenizer.no_padding()
        self._model = BertEncoder(folder)
        self.dim = self._model.hidden

    def embed(self, texts: Sequence[str]) -> Vectors:
        """`[len(texts), dim]` float32, rows of length 1. Safe to call from several threads."""
        texts = _checked(texts)
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        if not texts:
            return out
        with self._lock, self._limited(), self._torch.inference_mode():
            ids = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
            order = sorted(range(len(texts)), key=lambda i: len(ids[i]))  # little padding in a batch
            for start in range(0, len(order), self.batch):
                rows = order[start : start + self.batch]
                out[rows] = self._embed_batch([ids[i] for i in rows])
        return out

    def _embed_batch(self, ids: list[list[int]]) -> Vectors:
        longest = max(map(len, ids))
        padded = self._torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        mask = self._torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        weight = mask.unsqueeze(-1)
        hidden = self._model(padded, mask)
        return normalise(((hidden * weight).sum(1) / weight.sum(1).clamp(min=1)).numpy())

    @contextmanager
    def _limited(self) -> Iterator[None]:
        if self.threads is None:
            yield
            return
        before = self._torch.get_num_threads()
        self._torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            self._torch.set_num_threads(before)


# -- without a model -----------------------------------------------------------------------------

_WORD = re.compile(r"\w+")
_COMMON = """
a an and are as at be but by did do does for from had has have he her him his how i if in is it its me my
of on or our she so that the their them they this to us was we were what when where which who why will
with you your
"""
COMMON_WORDS = frozenset(_COMMON.split())


class HashingEmbedder:
    """Words, word pairs and 3- to 5-letter pieces hashed into `dim` signed buckets; no model, no state.

    Finds shared words and spellings, not meaning. The same text gives the same vector in every process.
    Source of the method: Weinberger et al., Feature Hashing, arXiv 0902.2206.
    """

    def __init__(self, dim: int = 384) -> None:
        if dim < 8:
            raise ValueError(f"dim is {dim}; use at least 8, better a few hundred")
        self.dim = dim
        self.model_id = f"hashing:1:{dim}"

    def embed(self, texts: Sequence[str]) -> Vectors:
        """`[len(texts), dim]` float32, rows of length 1."""
        texts = _checked(texts)
        rows = np.zeros((len(texts), self.dim))
        for row, text in zip(rows, texts, strict=True):
            for feature, weight in _features(text).items():
                value = _hash(feature)
                row[(value >> 1) % self.dim] += weight if value & 1 else -weight
        return normalise(rows)


@lru_cache(maxsize=1 << 16)
def _hash(feature: str) -> int:
    return int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "little")


def _features(text: str) -> dict[str, float]:
    """Weight of each feature: repeated words count less and less, everyday words hardly at all."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    features: dict[str, float] = {}
    for word, count in Counter(words).items():
        weight = (0.1 if word in COMMON_WORDS else 1.0) * (1 + np.log(count))
        features[f"w:{word}"] = weight
        padded = f"<{word}>"
        pieces = [padded[i : i + n] for n in (3, 4, 5) for i in range(len(padded) - n + 1)]
        for piece in pieces:  # together they weigh as much as half a word
            features[f"c:{piece}"] = features.get(f"c:{piece}", 0.0) + 0.5 * weight / np.sqrt(len(pieces))
    content = [word for word in words if word not in COMMON_WORDS]
    for pair, count in Counter(pairwise(content)).items():
        features[f"p:{pair[0]} {pair[1]}"] = 0.5 * (1 + np.log(count))
    return features or {f"t:{text.strip()}": 1.0}  # only punctuation: the text itself is the feature


# -- others --------------------------------------------------------------------------------------


class SentenceTransformerEmbedder:
    """Any sentence-transformers model, by name or folder (extra `embed`)."""

    def __init__(self, name: str) -> None:
        """Raises UnsupportedModelError where sentence-transformers is not installed."""
        try:
            library: Any = importlib.import_module("sentence_transformers")
        except ImportError:
            raise UnsupportedModelError(
                f"{name} needs sentence-transformers; run: pip install 'memos-engine[embed]'"
            ) from None
        self._model = library.SentenceTransformer(name)
        digest = hashlib.sha256()
        for key, value in sorted(self._model.state_dict().items()):
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.float().numpy().tobytes())
        self.model_id = f"sentence-transformers:{name}:{digest.hexdigest()[:16]}"
        self.dim = int(self.embed(["a"]).shape[1])

    def embed(self, texts: Sequence[str]) -> Vectors:
        """`[len(texts), dim]` float32, rows of length 1."""
        texts = _checked(texts)
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        vectors = self._model.encode(texts, convert_to_numpy=True, show_progress_bar=False)
        return normalise(np.asarray(vectors))


_warned = threading.Event()


def default_embedder() -> Embedder:
    """all-MiniLM-L6-v2 from the cache; where it was never pulled, hashing with one logged warning."""
    try:
        path = resolve("minilm")
    except ModelFilesError as error:
        if not _warned.is_set():
            _warned.set()
            logger.warning("searching by hashed words instead of by meaning: %s", error)
        return HashingEmbedder()
    return MiniLMEmbedder(path)
