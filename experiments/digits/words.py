"""Embeddings of common English words, counted from texts inside scikit-learn: a codebook for recipes that need one offline.

Letters: L lines of text, K words, E channels of an embedding.
"""

import argparse
import json
import sys
from pathlib import Path

import sklearn
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

WORDS, CHANNELS = 128, 32
"""What lightning_configs/tokenizers/digits_text.yaml says too."""


def embeddings(words: int = WORDS, channels: int = CHANNELS, seed: int = 0) -> tuple[list[str], Float[Tensor, "K E"]]:
    """The commonest words and what each one's lines have in common (latent semantic analysis); rows of length 1."""
    folder = Path(sklearn.__file__).parent / "datasets" / "descr"
    lines = [line for path in sorted(folder.glob("*.rst")) for line in path.read_text(encoding="utf-8").splitlines()]
    counts = TfidfVectorizer(max_features=words, token_pattern=r"[a-z]{3,}")
    found = counts.fit_transform(lines)  # (L, K)
    svd = TruncatedSVD(channels, random_state=seed).fit(found)
    rows = torch.from_numpy(svd.components_.T * svd.singular_values_).float()  # (K, E)
    return list(counts.get_feature_names_out()), torch.nn.functional.normalize(rows, dim=-1)


def main(argv: list[str] | None = None) -> int:
    """Count them, write them."""
    parser = argparse.ArgumentParser("python -m experiments.digits.words", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    args = parser.parse_args(argv)
    words, rows = embeddings()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"words": rows.contiguous()}, args.out)
    print(json.dumps({"embeddings": str(args.out), "words": len(words), "channels": rows.shape[1], "first": words[:5]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
