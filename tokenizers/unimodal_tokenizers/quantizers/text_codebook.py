"""A codebook made of words: embeddings of a language model, seen through one learned linear map (TA-Tok, arXiv 2506.18898).

Letters: K entries, E channels of a text's embedding, D of a code.
"""

from pathlib import Path

import torch
from torch import nn

from unimodal_tokenizers.quantizers.simvq import SimVQ


class TextCodebook(SimVQ):
    """Each vector to the nearest of the codes W t_k, t_k the frozen embedding of text k (TA-Tok).

    It is SimVQ whose entries mean something. They begin as random rows: `load` gives the embeddings, and an export carries
    them.
    """

    def __init__(self, entries: int, dim: int, text_dim: int, seed: int = 0) -> None:
        """Args:

        entries: texts K.
        dim: channels D of a code.
        text_dim: channels E of an embedding.
        seed: of the rows until they are loaded.
        """
        super().__init__(entries, dim, seed)
        if text_dim < 1:
            raise ValueError(f"text_dim: expected at least 1, got {text_dim}")
        rng = torch.Generator().manual_seed(seed)
        self.entries = torch.randn(entries, text_dim, generator=rng, device="cpu") * text_dim**-0.5
        self.map = nn.Linear(text_dim, dim, bias=False)  # W

    def load(self, path: Path) -> None:
        """The embeddings: a safetensors file that holds one matrix `(K, E)`, as the embedding of a language model.

        Raises:
            ValueError: the file is missing or damaged, or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = list(load_file(path).values())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"text_embeddings: {path} is missing or no safetensors file ({error})") from error
        shapes = [tuple(t.shape) for t in tensors]
        if shapes != [tuple(self.entries.shape)] or not tensors[0].is_floating_point():
            raise ValueError(f"text_embeddings: expected one matrix {tuple(self.entries.shape)}, {path} has {shapes}")
        self.entries.copy_(tensors[0])
