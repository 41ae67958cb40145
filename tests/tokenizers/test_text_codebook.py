"""A codebook of words: SimVQ over embeddings that are loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unimodal_tokenizers.quantizers import SimVQ, TextCodebook


def test_codes_are_loaded_embeddings_through_the_map(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codebook, words = TextCodebook(10, 3, text_dim=5), torch.randn(10, 5)
    save_file({"embedding": words}, tmp_path / "words")
    codebook.load(tmp_path / "words")
    codes = words @ codebook.map.weight.T
    torch.testing.assert_close(codebook.ids_to_vectors(torch.arange(10)), codes)
    z = torch.randn(7, 3)
    assert torch.equal(codebook.vectors_to_ids(z), torch.cdist(z, codes).argmin(1))
    assert torch.equal(codebook.vectors_to_ids(codes), torch.arange(10))
    result = codebook(z.requires_grad_())
    sum(result.terms.values()).backward()
    assert codebook.map.weight.grad is not None
    assert codebook.map.weight.grad.any()
    assert not codebook.entries.requires_grad
    assert isinstance(codebook, SimVQ)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    codebook = TextCodebook(10, 3, text_dim=5)
    with pytest.raises(ValueError, match=r"text_embeddings: .*none is missing"):
        codebook.load(tmp_path / "none")
    save_file({"embedding": torch.zeros(10, 4)}, tmp_path / "words")
    with pytest.raises(ValueError, match=r"text_embeddings: expected one matrix \(10, 5\), .* has \[\(10, 4\)\]"):
        codebook.load(tmp_path / "words")
    with pytest.raises(ValueError, match="text_dim: expected at least 1, got 0"):
        TextCodebook(10, 3, text_dim=0)
