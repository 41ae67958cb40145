"""Published tokenizers with one codebook on a grid; the networks are those of transformers, and one of ours.

Letters: B images, H height, W width (pixels); h, w the token grid, N = h w; T tokens of all images end to end, P encoder
outputs of all of them (B h w), D channels of a code, K entries of the codebook. z an encoder output and e a code.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from unimodal_tokenizers.base import Grid, ImageTokenizer, Reconstruction, TokenLayout, TrainableTokenizer
from unimodal_tokenizers.convolutions import ConvDecoder, ConvEncoder
from unimodal_tokenizers.latents import FrozenNetwork, check_colours, check_options
from unimodal_tokenizers.quantizers.base import check_ids, precise
from unimodal_tokenizers.quantizers.search import nearest_code, nearest_code_of_any_length


class CodeTokenizer(ImageTokenizer):
    """An image as h x w ids. Subclasses say how images become vectors, vectors ids, and how ids become images."""

    @abstractmethod
    def image_to_vectors(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "P D"]:
        """Encoder outputs z, row by row."""

    @abstractmethod
    def vectors_to_ids(self, vectors: Float[Tensor, "P D"]) -> Int64[Tensor, " P"]:
        """The id of the code of each z."""

    @abstractmethod
    def ids_to_vectors(self, ids: Int64[Tensor, "*T"]) -> Float[Tensor, "*T D"]:
        """The codes e of ids that are in the codebook; `vectors_to_ids` gives the ids back."""

    @abstractmethod
    def ids_to_image(self, ids: Int64[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images, about in [-1, 1], of ids that are in the codebook."""

    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Int64[Tensor, "B N"]:
        """Images `(B, 3, H, W)` in [-1, 1] to ids `(B, N)`; `rng` is not used.

        Raises:
            ValueError: the stride does not divide the image's height and width.
        """
        grid = self.layout.grid(*images.shape[-2:])
        with torch.no_grad():
            return self.vectors_to_ids(self.image_to_vectors(images)).unflatten(0, (-1, grid.length))  # (B, N)

    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Ids `(B, N)` to images `(B, 3, H, W)`, about in [-1, 1] (not clamped); `rngs` are not used.

        Raises:
            ValueError: ids that are no integers or lie outside the codebook, or not as many of them as the grid has.
        """
        if tokens.dim() != 2 or tokens.shape[1] != grid.length:
            raise ValueError(f"tokens: expected ids (B, {grid.length}), got shape {tuple(tokens.shape)}")
        return self.ids_to_image(self._checked(tokens).unflatten(1, (grid.h, grid.w)))

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Ids `(T,)` to their codes `(T, D)`.

        Raises:
            ValueError: ids that are no integers or lie outside the codebook.
        """
        if tokens.dim() != 1:
            raise ValueError(f"tokens: expected ids (T,), got shape {tuple(tokens.shape)}")
        return self.ids_to_vectors(self._checked(tokens))

    def _checked(self, ids: Shaped[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
        check_ids(ids, self.layout.codebooks[0])
        return ids.long()


class CodebookNetwork(FrozenNetwork, CodeTokenizer):
    """A network of transformers with a table of codes: the code of z is the one nearest to it."""

    def __init__(self, name: str, options: Mapping[str, Any], entries: str) -> None:
        super().__init__()
        network = transformers_network(name, options)
        c = network.config
        check_colours(c.in_channels, getattr(c, "out_channels", 3))
        stride = 2 ** (len(c.channel_multiplier) - 1)
        self.layout = TokenLayout("discrete", dim=c.embed_dim, stride=stride, codebooks=(getattr(c, entries),))
        self._freeze(network)

    @property
    def codes(self) -> Float[Tensor, "K D"]:
        """The codebook, in single precision at least: half precision confuses neighbouring codes."""
        return precise(self.network.quantize.embedding.weight)

    def vectors_to_ids(self, vectors: Float[Tensor, "P D"]) -> Int64[Tensor, " P"]:
        """argmin_k |z - e_k|."""
        with torch.autocast(vectors.device.type, enabled=False):
            return nearest_code_of_any_length(vectors.to(self.codes.dtype), self.codes)

    def ids_to_vectors(self, ids: Int64[Tensor, "*T"]) -> Float[Tensor, "*T D"]:
        """Rows of the codebook."""
        return F.embedding(ids, self.codes)


class Emu3Tokenizer(CodebookNetwork):
    """The video tokenizer of Emu3 (arXiv 2409.18869), an image being as many equal frames as one code covers: Emu3VQVAE."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Args:

        options: settings of transformers' Emu3VQVAEConfig.
        """
        super().__init__("Emu3VQVAE", options, "codebook_size")

    def image_to_vectors(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "P D"]:
        """Encoder outputs of the frames."""
        frames = self.network.config.temporal_downsample_factor
        video = self.network.encoder(images[:, None].repeat(1, frames, 1, 1, 1))  # (B, 1, D, h, w)
        return rearrange(self.network.quant_conv(video.transpose(1, 2)), "B D 1 h w -> (B h w) D")

    def ids_to_image(self, ids: Int64[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """The first frame."""
        return self.network.decode(ids)


class JanusTokenizer(CodebookNetwork):
    """The tokenizer of LlamaGen (arXiv 2406.06525, VQ-16), which Janus and Janus-Pro read: transformers' JanusVQVAE.

    z and the codes are compared on the unit sphere, as both papers' code trains them; the decoder reads codes of length 1.
    `JanusVQVAE.encode` compares them as they are, which is the same as long as the codes were stored with length 1.
    Images of any size are decoded, whatever `num_patches` says.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Args:

        options: settings of transformers' JanusVQVAEConfig.
        """
        super().__init__("JanusVQVAE", options, "num_embeddings")

    @property
    def codes(self) -> Float[Tensor, "K D"]:
        """e / |e|."""
        return F.normalize(super().codes, dim=-1)

    def image_to_vectors(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "P D"]:
        """Encoder outputs."""
        return rearrange(self.network.quant_conv(self.network.encoder(images)), "B D h w -> (B h w) D")

    def vectors_to_ids(self, vectors: Float[Tensor, "P D"]) -> Int64[Tensor, " P"]:
        """argmin_k |z / |z| - e_k / |e_k||."""
        with torch.autocast(vectors.device.type, enabled=False):
            return nearest_code(F.normalize(vectors.to(self.codes.dtype), dim=-1), self.codes)

    def ids_to_image(self, ids: Int64[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """What the decoder makes of the codes."""
        codes = rearrange(self.ids_to_vectors(ids), "B h w D -> B D h w")
        convolution = self.network.post_quant_conv
        return self.network.decoder(convolution(codes.to(convolution.weight.dtype)))


class ChameleonTokenizer(CodebookNetwork, TrainableTokenizer):
    """Encoder and codebook of Chameleon (arXiv 2405.09818), frozen: transformers' ChameleonVQVAE; a decoder of ours.

    transformers holds no decoder. Ours has the form of the published one, whose weights it takes where a folder has them
    (`decoder.*`); otherwise it begins with random ones, to be trained.
    """

    def __init__(self, options: Mapping[str, Any], groups: int = 32) -> None:
        """Args:

        options: settings of transformers' ChameleonVQVAEConfig.
        groups: groups of the decoder's group norms.
        """
        super().__init__("ChameleonVQVAE", options, "num_embeddings")
        c = self.network.config
        widths = [c.base_channels * m for m in c.channel_multiplier]
        self.decoder = ConvDecoder(c.latent_channels, widths, [c.num_res_blocks + 1] * len(widths), groups)
        self.weights: Mapping[str, float] = {}

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        """Images through ids and back, for training the decoder."""
        grid = self.layout.grid(*images.shape[-2:])
        ids = self.encode_batch(images)
        counts = torch.bincount(ids.flatten(), minlength=self.layout.codebooks[0])
        return Reconstruction(self.decode_batch(ids, grid), {}, counts)

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight."""
        return self.decoder.conv_out.get_parameter("weight")

    def image_to_vectors(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "P D"]:
        """Encoder outputs."""
        return rearrange(self.network.quant_conv(self.network.encoder(images)), "B D h w -> (B h w) D")

    def ids_to_image(self, ids: Int64[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """What the decoder makes of the codes."""
        codes = rearrange(self.ids_to_vectors(ids), "B h w D -> B D h w")
        convolution = self.network.post_quant_conv
        return self.decoder(convolution(codes.to(convolution.weight.dtype)))


class MagvitTokenizer(FrozenNetwork, CodeTokenizer):
    """The tokenizer of Show-o (arXiv 2408.12528) and MMaDA: MAGVIT-v2's quantizer (arXiv 2310.05737).

    Nothing is looked up: a code is the signs of z, +1 or -1, and its id reads them as bits, the first channel highest.
    """

    def __init__(
        self,
        bits: int = 13,
        encoder_widths: Sequence[int] = (128, 256, 256, 512, 512),
        encoder_blocks: Sequence[int] = (4, 3, 4, 3, 4),
        decoder_widths: Sequence[int] = (128, 128, 256, 256, 512),
        decoder_blocks: Sequence[int] = (4, 4, 3, 4, 3),
        groups: int = 32,
    ) -> None:
        """Args: the published ones unless others are given.

        bits: channels of a code; the codebook has 2 ** bits entries.
        encoder_widths: channels at each resolution, fine to coarse; the stride is 2 ** (their number - 1) pixels.
        encoder_blocks: residual blocks at each.
        decoder_widths: likewise.
        decoder_blocks: likewise.
        groups: groups of the group norms.
        """
        super().__init__()
        if not 1 <= bits <= 24:
            raise ValueError(f"bits: expected 1 to 24, got {bits}")
        if len(encoder_widths) != len(decoder_widths):
            raise ValueError(f"decoder_widths: expected {len(encoder_widths)} resolutions, got {len(decoder_widths)}")
        stride = 2 ** (len(encoder_widths) - 1)
        self.layout = TokenLayout("discrete", dim=bits, stride=stride, codebooks=(2**bits,))
        encoder = ConvEncoder(bits, encoder_widths, encoder_blocks, groups)
        encoder.quant_conv = nn.Conv2d(bits, bits, 1)
        decoder = ConvDecoder(bits, decoder_widths, decoder_blocks, groups)
        decoder.post_quant_conv = nn.Conv2d(bits, bits, 1)
        self._freeze(nn.ModuleDict({"encoder": encoder, "decoder": decoder}))
        self.register_buffer("places", 2 ** torch.arange(bits - 1, -1, -1), persistent=False)  # of the bits

    places: Int64[Tensor, " D"]

    def image_to_vectors(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "P D"]:
        """Encoder outputs."""
        encoder = self.network["encoder"]
        return rearrange(encoder.quant_conv(encoder(images)), "B D h w -> (B h w) D")

    def vectors_to_ids(self, vectors: Float[Tensor, "P D"]) -> Int64[Tensor, " P"]:
        """sum_i 2^(D - 1 - i) [z_i > 0] (MAGVIT-v2, with the bits the other way round)."""
        return ((vectors > 0) * self.places).sum(-1)

    def ids_to_vectors(self, ids: Int64[Tensor, "*T"]) -> Float[Tensor, "*T D"]:
        """+1 for a bit that is set, -1 for one that is not."""
        weight = self.network["decoder"].post_quant_conv.weight
        return ((ids[..., None] & self.places) > 0).to(weight.dtype) * 2 - 1

    def ids_to_image(self, ids: Int64[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """What the decoder makes of the codes."""
        decoder = self.network["decoder"]
        return decoder(decoder.post_quant_conv(rearrange(self.ids_to_vectors(ids), "B h w D -> B D h w")))


def transformers_network(name: str, options: Mapping[str, Any]) -> Any:
    """A class of transformers with random weights.

    Raises:
        ValueError: its config takes no such option, or not this value.
    """
    import transformers  # here: it takes seconds, which whoever trains on pixels need not wait for

    made, config = getattr(transformers, name), getattr(transformers, f"{name}Config")
    check_options(name, options, set(config.__annotations__))
    try:
        return made(config(**options))
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"options: expected what {name} takes, got {options} ({error})") from error
