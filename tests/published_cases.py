"""Published image tokenizers as the tests build them: their own classes with random weights, tiny, saved to disk.

`MagvitReference` says by functions what the state dict of Show-o's tokenizer means, since no library holds its class.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
BITS = 5
MAGVIT = {"encoder_widths": [4, 8], "encoder_blocks": [2, 1], "decoder_widths": [4, 8], "decoder_blocks": [1, 2]}


class Case(NamedTuple):
    """A published class, what its tokens look like, and what it says itself of images in [-1, 1]."""

    save: Callable[[Path], Any]  # writes a folder, gives back the original
    layout: tuple[str, int, int, tuple[int, ...]]  # kind, dim, stride, codebooks
    encode: Callable[[Any, Tensor], Tensor]  # images to normalised latents (B, D, h, w), or ids (B, N)
    decode: Callable[[Any, Tensor], Tensor]  # the way back


def _made(network: Any, seed: int = 0) -> Any:
    """Random everywhere: no weight that begins as zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def autoencoder_kl(folder: Path, **settings: Any) -> Any:
    """As FLUX's: a scale, a shift and no convolution beside the latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    settings = {
        "block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, "scaling_factor": 0.36,
        "shift_factor": 0.12, "use_quant_conv": False, "use_post_quant_conv": False, **settings,
    }  # fmt: skip
    n = len(settings["block_out_channels"])
    types = {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
    network = _made(AutoencoderKL(**types, **settings))
    network.save_pretrained(folder)
    return network


def autoencoder_dc(folder: Path) -> Any:
    """As SANA's: a scale, no posterior."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    levels: dict[str, Any] = {}
    for name in ("encoder", "decoder"):
        levels |= {
            f"{name}_block_types": ("ResBlock", "EfficientViTBlock"), f"{name}_block_out_channels": (4, 8),
            f"{name}_layers_per_block": (1, 1), f"{name}_qkv_multiscales": ((), (3,)),
        }  # fmt: skip
    network = _made(AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41, **levels))
    network.save_pretrained(folder)
    return network


WAN = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.0, 0.5, 3.0]}


def autoencoder_wan(folder: Path) -> Any:
    """As Wan's: a mean and a deviation of each channel."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    settings = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}
    network = _made(AutoencoderKLWan(**settings, **WAN, scale_factor_spatial=2))
    network.save_pretrained(folder)
    return network


def autoencoder_wan_of_patches(folder: Path) -> Any:
    """As Wan 2.2's: squares of 2 x 2 pixels are channels."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    settings = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}
    patches = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 4}
    network = _made(AutoencoderKLWan(**settings, **WAN, **patches))
    network.save_pretrained(folder)
    return network


def autoencoder_rae(folder: Path) -> Any:
    """Images of 16 x 16 alone, read as 14 x 14."""
    from diffusers import AutoencoderRAE

    torch.manual_seed(0)
    mean, std = torch.randn(64, 1, 1).tolist(), (0.5 + torch.rand(64, 1, 1)).tolist()
    network = _made(
        AutoencoderRAE(
            encoder_hidden_size=64, encoder_patch_size=7, encoder_num_hidden_layers=1, encoder_input_size=14,
            decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=16, patch_size=8, latents_mean=mean, latents_std=std,
        )
    )  # fmt: skip
    network.save_pretrained(folder)
    return network


def emu3(folder: Path) -> Any:
    """Videos of four frames a code."""
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    torch.manual_seed(0)
    settings = {"codebook_size": 32, "base_channels": 32, "channel_multiplier": [1, 1], "hidden_size": 32}
    network = _made(Emu3VQVAE(Emu3VQVAEConfig(**settings, num_res_blocks=1, attn_resolutions=[1])))
    network.save_pretrained(folder)
    return network


def janus(folder: Path, **settings: Any) -> Any:
    """Codes of length 1, as stored codes must have for the original class to be right."""
    from transformers import JanusVQVAE, JanusVQVAEConfig

    torch.manual_seed(0)
    settings = {
        "embed_dim": 4, "num_embeddings": 32, "latent_channels": 16, "base_channels": 32,
        "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_patches": 8, **settings,
    }  # fmt: skip
    network = _made(JanusVQVAE(JanusVQVAEConfig(**settings)))
    codes = network.quantize.embedding.weight
    codes.data = F.normalize(torch.randn(codes.shape), dim=-1)
    network.save_pretrained(folder)
    return network


def chameleon(folder: Path) -> Any:
    """The encoder alone."""
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    torch.manual_seed(0)
    settings = {"embed_dim": 4, "num_embeddings": 32, "latent_channels": 16, "base_channels": 32, "num_res_blocks": 1}
    network = _made(ChameleonVQVAE(ChameleonVQVAEConfig(**settings, channel_multiplier=[1, 1], resolution=16)))
    network.save_pretrained(folder)
    return network


def magvit(folder: Path) -> State:
    """Two resolutions, five bits."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in _magvit_shapes()}
    state = {n: t / t[0].numel() ** 0.5 if t.dim() > 1 else 0.3 * t + ("norm" in n) for n, t in state.items()}
    bits = torch.arange(2**BITS)[:, None] >> torch.arange(BITS - 1, -1, -1) & 1
    tables = {"quantize.embedding": bits.float() * 2 - 1, "quantize.power_vals": 2 ** torch.arange(BITS - 1, -1, -1)}
    folder.mkdir(parents=True)
    save_file({**state, **tables}, folder / "model.safetensors")
    record = {"_class_name": "MAGVITv2", "_version": "0.0.1", "bits": BITS, "groups": 4, **MAGVIT}
    (folder / "config.json").write_text(json.dumps(record))
    return state


def _magvit_shapes() -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes as Show-o's classes give them."""
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def convolution(name: str, out: int, c: int, side: int = 3) -> None:
        shapes.extend([(f"{name}.weight", (out, c, side, side)), (f"{name}.bias", (out,))])

    def norm(name: str, c: int) -> None:
        shapes.extend([(f"{name}.weight", (c,)), (f"{name}.bias", (c,))])

    def block(name: str, c: int, out: int) -> None:
        norm(f"{name}.norm1", c)
        convolution(f"{name}.conv1", out, c)
        norm(f"{name}.norm2", out)
        convolution(f"{name}.conv2", out, out)
        if c != out:
            convolution(f"{name}.nin_shortcut", out, c, 1)

    for side, way in (("encoder", "down"), ("decoder", "up")):
        widths, blocks = MAGVIT[f"{side}_widths"], MAGVIT[f"{side}_blocks"]
        ends = (3, BITS) if side == "encoder" else (BITS, 3)
        first, last = (widths[0], widths[-1]) if side == "encoder" else (widths[-1], widths[0])
        convolution(f"{side}.conv_in", first, ends[0])
        convolution(f"{side}.conv_out", ends[1], last)
        norm(f"{side}.norm_out", last)
        convolution(f"{side}.quant_conv" if side == "encoder" else f"{side}.post_quant_conv", BITS, BITS, 1)
        for i, out in enumerate(widths):
            before = max(i - 1, 0) if side == "encoder" else min(i + 1, len(widths) - 1)
            for j in range(blocks[i]):
                block(f"{side}.{way}.{i}.block.{j}", widths[before] if j == 0 else out, out)
        convolution(f"{side}.{way}.{0 if side == 'encoder' else 1}.{way}sample.conv", *[first] * 2)
        coarsest = widths[-1]
        block(f"{side}.mid.block_1", coarsest, coarsest)
        block(f"{side}.mid.block_2", coarsest, coarsest)
        norm(f"{side}.mid.attn_1.norm", coarsest)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{side}.mid.attn_1.{part}", coarsest, coarsest, 1)
    return shapes


class MagvitReference:
    """Layer by layer, the names spelt out."""

    def __init__(self, state: State) -> None:
        self.state = state

    def convolution(self, name: str, x: Tensor, **settings: Any) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(x, weight, bias, **{"padding": weight.shape[-1] // 2, **settings})

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 4, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def block(self, name: str, x: Tensor) -> Tensor:
        y = self.norm(f"{name}.norm1", x)
        y = self.convolution(f"{name}.conv1", y * y.sigmoid())
        y = self.norm(f"{name}.norm2", y)
        y = self.convolution(f"{name}.conv2", y * y.sigmoid())
        return y + (self.convolution(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        y = self.norm(f"{name}.norm", x)
        q, k, v = (self.convolution(f"{name}.{part}", y).flatten(2) for part in "qkv")  # (B, C, N)
        weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / q.shape[1] ** 0.5, -1)
        out = torch.einsum("bnm,bcm->bcn", weights, v).view_as(x)
        return x + self.convolution(f"{name}.proj_out", out)

    def middle(self, name: str, x: Tensor) -> Tensor:
        return self.block(f"{name}.block_2", self.attention(f"{name}.attn_1", self.block(f"{name}.block_1", x)))

    def end(self, name: str, x: Tensor) -> Tensor:
        y = self.norm(f"{name}.norm_out", x)
        return self.convolution(f"{name}.conv_out", y * y.sigmoid())

    def encode(self, images: Tensor) -> Tensor:
        x = self.convolution("encoder.conv_in", images)
        x = self.block("encoder.down.0.block.1", self.block("encoder.down.0.block.0", x))
        x = self.convolution("encoder.down.0.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        x = self.block("encoder.down.1.block.0", x)
        x = self.convolution("encoder.quant_conv", self.end("encoder", self.middle("encoder.mid", x)))
        ids = torch.zeros(len(x), *x.shape[-2:], dtype=torch.int64)
        for channel in x.unbind(1):
            ids = 2 * ids + (channel > 0)
        return ids.flatten(1)

    def decode(self, ids: Tensor) -> Tensor:
        signs = torch.stack([2.0 * (ids >> i & 1) - 1 for i in range(BITS - 1, -1, -1)], 1)  # (B, D, h, w)
        x = self.convolution("decoder.conv_in", self.convolution("decoder.post_quant_conv", signs))
        x = self.middle("decoder.mid", x)
        x = self.block("decoder.up.1.block.1", self.block("decoder.up.1.block.0", x))
        x = self.convolution("decoder.up.1.upsample.conv", x.repeat_interleave(2, -2).repeat_interleave(2, -1))
        return self.end("decoder", self.block("decoder.up.0.block.0", x))


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


def _wan_latent(network: Any, images: Tensor) -> Tensor:
    z = network.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]
    return (z - _column(WAN["latents_mean"])) / _column(WAN["latents_std"])


def _wan_image(network: Any, latent: Tensor) -> Tensor:
    z = latent * _column(WAN["latents_std"]) + _column(WAN["latents_mean"])
    return network.decode(z[:, :, None]).sample[:, :, 0]


def _emu3_ids(network: Any, images: Tensor) -> Tensor:
    sizes = torch.tensor([images.shape[-2:]] * len(images))
    return torch.stack(network.encode(images, image_sizes=sizes).image_tokens).flatten(1)


def _unfold(ids: Tensor) -> Tensor:
    return ids.unflatten(1, (8, -1))  # the tests' images are 16 pixels high, the stride is 2


CASES = {
    "AutoencoderKL": Case(
        autoencoder_kl, ("continuous", 4, 2, ()),
        lambda net, x: (net.encode(x).latent_dist.mode() - 0.12) * 0.36,
        lambda net, z: net.decode(z / 0.36 + 0.12).sample,
    ),
    "AutoencoderDC": Case(
        autoencoder_dc, ("continuous", 4, 2, ()),
        lambda net, x: net.encode(x).latent * 0.41, lambda net, z: net.decode(z / 0.41).sample,
    ),
    "AutoencoderKLWan": Case(autoencoder_wan, ("continuous", 4, 2, ()), _wan_latent, _wan_image),
    "AutoencoderRAE": Case(
        autoencoder_rae, ("continuous", 64, 8, ()),
        lambda net, x: net.encode((x + 1) / 2).latent, lambda net, z: net.decode(z).sample * 2 - 1,
    ),
    "Emu3VQVAE": Case(
        emu3, ("discrete", 4, 2, (32,)), _emu3_ids, lambda net, ids: net.decode(_unfold(ids)),
    ),
    "JanusVQVAE": Case(
        janus, ("discrete", 4, 2, (32,)),
        lambda net, x: net.encode(x).image_tokens.view(len(x), -1), lambda net, ids: net.decode(ids),
    ),
    "ChameleonVQVAE": Case(
        chameleon, ("discrete", 4, 2, (32,)), lambda net, x: net.encode(x).image_tokens.view(len(x), -1),
        lambda net, ids: None,
    ),
    "MAGVITv2": Case(
        magvit, ("discrete", BITS, 2, (2**BITS,)), lambda net, x: MagvitReference(net).encode(x),
        lambda net, ids: MagvitReference(net).decode(_unfold(ids)),
    ),
}  # fmt: skip
# Of the strides and channels that the recipes' weights have, by the folder they name.
RECIPES: dict[str, Callable[[Path], Any]] = {
    "flux_vae": lambda folder: autoencoder_kl(folder, block_out_channels=(4, 4, 4, 4), latent_channels=16),
    "janus": lambda folder: janus(folder, channel_multiplier=[1] * 5, embed_dim=8, num_patches=4),
}
DISCRETE = [name for name, case in CASES.items() if case.layout[0] == "discrete"]
CONTINUOUS = [name for name in CASES if name not in DISCRETE]
