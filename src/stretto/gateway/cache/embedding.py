"""Vectors of questions: the mean of the static vectors of a text's tokens. Cheap enough for every request.

The vectors are those of the package wordllama (MIT), which ships them as a file of 16 MB; only its data is
read, none of its code runs. Without the package, character n-grams are hashed into a vector, which finds
equal words and misses synonyms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import cast
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load
from tokenizers import Tokenizer

TextVector = NDArray[np.float32]  # [DIMENSIONS], of length 1
TextEmbedder = Callable[[str], TextVector]
DIMENSIONS = 256
PACKAGE = "wordllama"
WEIGHTS, TABLE = "weights/l2_supercat_256.safetensors", "embedding.weight"
TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"
GRAMS = (3, 4, 5)  # characters


def embed(text: str) -> TextVector:
    """The vector of a text by the best embedder here. The first call reads the package's file."""
    return best_embedder()[0](text)


@cache
def best_embedder() -> tuple[TextEmbedder, str]:
    """The embedder to use here, and its name: `wordllama` if the package is there, else `n-grams`."""
    spec = find_spec(PACKAGE)  # not imported
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    if folder is None or not (folder / WEIGHTS).is_file():
        return n_grams, "n-grams"
    return static_vectors(folder), PACKAGE


def static_vectors(folder: Path) -> TextEmbedder:
    """The embedder of the package in that folder. Raises OSError for files that cannot be read."""
    table = cast("NDArray[np.float16]", load((folder / WEIGHTS).read_bytes())[TABLE])
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def mean(text: str) -> TextVector:
        ids = tokenizer.encode(text.lower(), add_special_tokens=False).ids
        return _unit(table[ids].astype(np.float32).mean(axis=0) if ids else np.zeros(DIMENSIONS, np.float32))

    return mean


def n_grams(text: str) -> TextVector:
    """The hashed character n-grams of a text, each counted as the root of how often it occurs. The sign of a
    hash lets collisions cancel out (Weinberger et al., arXiv 0902.2206)."""
    vector = np.zeros(DIMENSIONS, np.float32)
    for word in text.lower().split():
        padded = f" {word} "
        for size in GRAMS:
            for start in range(max(1, len(padded) - size + 1)):
                code = crc32(padded[start : start + size].encode("utf-8", "surrogatepass"))
                vector[code % DIMENSIONS] += 1.0 if code & 0x8000_0000 else -1.0
    return _unit(np.sign(vector) * np.sqrt(np.abs(vector)))


def _unit(vector: TextVector) -> TextVector:
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector
