"""mmdetection's Mask2Former with a Swin backbone: its tensors' names, and its forward pass written out slowly in this file.

Written from the description of the modules (names, order of channels, padding, masks), for comparison with what the
converted weights compute in transformers. Nothing is shared with either library but torch's elementary operations.

Letters: B images, H x W places of a map, C channels, L tokens, Q queries, N heads.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

LEVELS, POINTS = 3, 4


@dataclass(frozen=True)
class Sizes:
    """Of the network; the defaults are the published one's."""

    embed: int = 96
    depths: tuple = (2, 2, 18, 2)
    heads: tuple = (3, 6, 12, 24)
    window: int = 7
    ratio: int = 4
    width: int = 256
    attention_heads: int = 8
    encoder: int = 6
    encoder_hidden: int = 1024
    decoder: int = 9
    decoder_hidden: int = 2048
    queries: int = 100
    classes: int = 80


TINY = Sizes(
    embed=8, depths=(2, 1, 2, 1), heads=(1, 2, 4, 4), window=3, ratio=2, width=32, attention_heads=4, encoder=2,
    encoder_hidden=24, decoder=4, decoder_hidden=40, queries=7,
)  # fmt: skip


def names(sizes, version=2):
    """Tensor names of a checkpoint with their shapes."""
    shapes = {}

    def affine(name, out, into=None):
        shapes[f"{name}.weight"] = (out,) if into is None else (out, into)
        shapes[f"{name}.bias"] = (out,)

    shapes["backbone.patch_embed.projection.weight"] = (sizes.embed, 3, 4, 4)
    shapes["backbone.patch_embed.projection.bias"] = (sizes.embed,)
    affine("backbone.patch_embed.norm", sizes.embed)
    for stage, depth in enumerate(sizes.depths):
        width = sizes.embed * 2**stage
        affine(f"backbone.norm{stage}", width)
        for block in range(depth):
            at = f"backbone.stages.{stage}.blocks.{block}"
            affine(f"{at}.norm1", width)
            affine(f"{at}.norm2", width)
            table = (2 * sizes.window - 1) ** 2
            shapes[f"{at}.attn.w_msa.relative_position_bias_table"] = (table, sizes.heads[stage])
            shapes[f"{at}.attn.w_msa.relative_position_index"] = (sizes.window**2, sizes.window**2)
            affine(f"{at}.attn.w_msa.qkv", 3 * width, width)
            affine(f"{at}.attn.w_msa.proj", width, width)
            affine(f"{at}.ffn.layers.0.0", sizes.ratio * width, width)
            affine(f"{at}.ffn.layers.1", width, sizes.ratio * width)
        if stage < 3:
            affine(f"backbone.stages.{stage}.downsample.norm", 4 * width)
            shapes[f"backbone.stages.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
    head, width = "panoptic_head", sizes.width
    pixel = f"{head}.pixel_decoder"
    for level in range(LEVELS):
        shapes[f"{pixel}.input_convs.{level}.conv.weight"] = (width, sizes.embed * 2 ** (3 - level), 1, 1)
        shapes[f"{pixel}.input_convs.{level}.conv.bias"] = (width,)
        affine(f"{pixel}.input_convs.{level}.gn", width)
    shapes[f"{pixel}.lateral_convs.0.conv.weight"] = (width, sizes.embed, 1, 1)
    shapes[f"{pixel}.output_convs.0.conv.weight"] = (width, width, 3, 3)
    affine(f"{pixel}.lateral_convs.0.gn", width)
    affine(f"{pixel}.output_convs.0.gn", width)
    shapes[f"{pixel}.mask_feature.weight"], shapes[f"{pixel}.mask_feature.bias"] = (width, width, 1, 1), (width,)
    shapes[f"{pixel}.level_encoding.weight"] = (LEVELS, width)
    own, cross, itself, feed = ("attentions.0", "attentions.0", "attentions.1", "ffns.0")
    if version == 3:
        own, cross, itself, feed = ("self_attn", "cross_attn", "self_attn", "ffn")
    for layer in range(sizes.encoder):
        at = f"{pixel}.encoder.layers.{layer}"
        affine(f"{at}.{own}.sampling_offsets", sizes.attention_heads * LEVELS * POINTS * 2, width)
        affine(f"{at}.{own}.attention_weights", sizes.attention_heads * LEVELS * POINTS, width)
        affine(f"{at}.{own}.value_proj", width, width)
        affine(f"{at}.{own}.output_proj", width, width)
        affine(f"{at}.{feed}.layers.0.0", sizes.encoder_hidden, width)
        affine(f"{at}.{feed}.layers.1", width, sizes.encoder_hidden)
        affine(f"{at}.norms.0", width)
        affine(f"{at}.norms.1", width)
    for layer in range(sizes.decoder):
        at = f"{head}.transformer_decoder.layers.{layer}"
        for attention in (cross, itself):
            shapes[f"{at}.{attention}.attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{at}.{attention}.attn.in_proj_bias"] = (3 * width,)
            affine(f"{at}.{attention}.attn.out_proj", width, width)
        affine(f"{at}.{feed}.layers.0.0", sizes.decoder_hidden, width)
        affine(f"{at}.{feed}.layers.1", width, sizes.decoder_hidden)
        for norm in range(3):
            affine(f"{at}.norms.{norm}", width)
    affine(f"{head}.transformer_decoder.post_norm", width)
    shapes[f"{head}.query_embed.weight"] = shapes[f"{head}.query_feat.weight"] = (sizes.queries, width)
    shapes[f"{head}.level_embed.weight"] = (LEVELS, width)
    affine(f"{head}.cls_embed", sizes.classes + 1, width)
    for place in (0, 2, 4):
        affine(f"{head}.mask_embed.{place}", width, width)
    return shapes


def window_index(window):
    """Which entry of the bias table belongs to a query and a key of a window, one pair at a time."""
    places = [(row, column) for row in range(window) for column in range(window)]
    size = 2 * window - 1
    return torch.tensor([[(y - v + window - 1) * size + x - u + window - 1 for v, u in places] for y, x in places])


def checkpoint(sizes, version=2, seed=0, device="cpu"):
    """A state dict of random tensors under the real names."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in names(sizes, version).items():
        if name.endswith("relative_position_index"):
            state[name] = window_index(sizes.window)
        elif device == "meta":
            state[name] = torch.empty(shape, device="meta")
        else:
            values = torch.randn(shape, generator=draw)
            if len(shape) > 1 and "embed.weight" not in name and "query" not in name and "table" not in name:
                values = values / math.sqrt(math.prod(shape[1:]))
            elif name.endswith(".weight") and len(shape) == 1:
                values = 1 + 0.3 * values
            state[name] = values
    return state


# --- the forward pass, on 2.x names


class Reference:
    """mmdetection's modules, one function each."""

    def __init__(self, state, sizes):
        self.state = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
        self.sizes = sizes

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0)

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def conv(self, name, x, **how):
        return functional.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **how)

    def group_norm(self, name, x):
        b, c, h, w = x.shape
        groups = x.reshape(b, 32, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        scaled = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(b, c, h, w)
        return scaled * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    # Swin

    def window_attention(self, name, x, heads, shift):
        """x (B, H, W, C): padded at the end, shifted, attended window by window, shifted back, cut."""
        b, height, width, channels = x.shape
        window = self.sizes.window
        rows, columns = -(-height // window) * window, -(-width // window) * window
        padded = x.new_zeros(b, rows, columns, channels)
        padded[:, :height, :width] = x
        out = torch.zeros_like(padded)
        table = self.state[f"{name}.relative_position_bias_table"]
        bias = table[self.state[f"{name}.relative_position_index"]].permute(2, 0, 1)  # (N, L, L)

        def region(place, length):
            return 0 if place < length - window else 1 if place < length - shift else 2

        for top in range(0, rows, window):
            for left in range(0, columns, window):
                places = [(top + i, left + j) for i in range(window) for j in range(window)]
                origin = [((y + shift) % rows, (u + shift) % columns) for y, u in places]
                y, u = (torch.tensor(axis) for axis in zip(*origin, strict=True))
                tokens = padded[:, y, u]  # (B, L, C)
                regions = torch.tensor([region(p, rows) * 3 + region(q, columns) for p, q in places])
                apart = (regions[:, None] != regions[None]) & (shift > 0)
                qkv = self.linear(f"{name}.qkv", tokens)
                q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
                scores = q @ k.transpose(-1, -2) / math.sqrt(channels // heads) + bias - 100.0 * apart
                mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
                out[:, y, u] = self.linear(f"{name}.proj", mixed)
        return out[:, :height, :width]

    def block(self, name, x, heads, shift):
        x = x + self.window_attention(f"{name}.attn.w_msa", self.norm(f"{name}.norm1", x), heads, shift)
        hidden = functional.gelu(self.linear(f"{name}.ffn.layers.0.0", self.norm(f"{name}.norm2", x)))
        return x + self.linear(f"{name}.ffn.layers.1", hidden)

    def merge(self, name, x):
        """unfold's order: channel first, then row, then column of the two by two pixels."""
        x = functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        b, height, width, _ = x.shape
        unfolded = functional.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2).transpose(1, 2)
        reduced = self.linear(f"{name}.reduction", self.norm(f"{name}.norm", unfolded))
        return reduced.reshape(b, height // 2, width // 2, -1)

    def swin(self, images):
        x = self.conv("backbone.patch_embed.projection", images, stride=4).permute(0, 2, 3, 1)
        x, maps = self.norm("backbone.patch_embed.norm", x), []
        for stage, depth in enumerate(self.sizes.depths):
            for number in range(depth):
                shift = self.sizes.window // 2 if number % 2 else 0
                x = self.block(f"backbone.stages.{stage}.blocks.{number}", x, self.sizes.heads[stage], shift)
            maps.append(self.norm(f"backbone.norm{stage}", x).permute(0, 3, 1, 2))
            if stage < 3:
                x = self.merge(f"backbone.stages.{stage}.downsample", x)
        return maps

    # pixel decoder

    def sine(self, height, width):
        """(width, H, W): y in the first half of the channels, sine and cosine in turn."""
        half = self.sizes.width // 2
        out = torch.zeros(self.sizes.width, height, width, dtype=torch.float64)
        for channel in range(half):
            wave = 10000 ** (2 * (channel // 2) / half)
            turn = math.sin if channel % 2 == 0 else math.cos
            for y in range(height):
                out[channel, y, :] = turn((y + 1) / (height + 1e-6) * 2 * math.pi / wave)
            for x in range(width):
                out[half + channel, :, x] = turn((x + 1) / (width + 1e-6) * 2 * math.pi / wave)
        return out

    @staticmethod
    def sample(value, x, y):
        """value (H, W, C) at places x, y (pixels; centres at whole numbers), zero outside."""
        height, width, _ = value.shape
        out = 0
        for dy in (0, 1):
            for dx in (0, 1):
                u, v = x.floor().long() + dx, y.floor().long() + dy
                weight = (1 - (x - u).abs()) * (1 - (y - v).abs())
                inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
                out = out + (weight * inside)[..., None] * value[v.clamp(0, height - 1), u.clamp(0, width - 1)]
        return out

    def deformable(self, name, x, position, shapes):
        """x (B, L, C) over all levels, coarse to fine."""
        heads = self.sizes.attention_heads
        asked = x + position
        offsets = self.linear(f"{name}.sampling_offsets", asked).unflatten(-1, (heads, LEVELS, POINTS, 2))
        weights = self.linear(f"{name}.attention_weights", asked).unflatten(-1, (heads, LEVELS * POINTS)).softmax(-1)
        weights = weights.unflatten(-1, (LEVELS, POINTS))
        values = self.linear(f"{name}.value_proj", x).unflatten(-1, (heads, -1))
        grids = [torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij") for h, w in shapes]
        here_y = torch.cat([(y.flatten() + 0.5) / h for (y, _), (h, _) in zip(grids, shapes, strict=True)]).double()
        here_x = torch.cat([(u.flatten() + 0.5) / w for (_, u), (_, w) in zip(grids, shapes, strict=True)]).double()
        mixed = torch.zeros_like(values)
        for image in range(len(x)):
            for head in range(heads):
                start = 0
                for level, (h, w) in enumerate(shapes):
                    value = values[image, start : start + h * w, head].reshape(h, w, -1)
                    start += h * w
                    for point in range(POINTS):
                        offset = offsets[image, :, head, level, point]
                        sampled = self.sample(value, here_x * w + offset[:, 0] - 0.5, here_y * h + offset[:, 1] - 0.5)
                        mixed[image, :, head] += weights[image, :, head, level, point, None] * sampled
        return self.linear(f"{name}.output_proj", mixed.flatten(2))

    def pixels(self, maps):
        at, coarse = "panoptic_head.pixel_decoder", maps[:0:-1]
        shapes = [tuple(m.shape[-2:]) for m in coarse]
        tokens, positions = [], []
        for level, some in enumerate(coarse):
            projected = self.group_norm(
                f"{at}.input_convs.{level}.gn", self.conv(f"{at}.input_convs.{level}.conv", some)
            )
            position = self.sine(*shapes[level]) + self.state[f"{at}.level_encoding.weight"][level][:, None, None]
            tokens.append(projected.flatten(2).transpose(1, 2))
            positions.append(position.flatten(1).T)
        x, position = torch.cat(tokens, 1), torch.cat(positions)
        for layer in range(self.sizes.encoder):
            name = f"{at}.encoder.layers.{layer}"
            x = self.norm(f"{name}.norms.0", x + self.deformable(f"{name}.attentions.0", x, position, shapes))
            hidden = self.linear(f"{name}.ffns.0.layers.0.0", x).relu()
            x = self.norm(f"{name}.norms.1", x + self.linear(f"{name}.ffns.0.layers.1", hidden))
        parts = x.split([h * w for h, w in shapes], 1)
        outs = [p.transpose(1, 2).unflatten(2, shape) for p, shape in zip(parts, shapes, strict=True)]
        fine = self.group_norm(f"{at}.lateral_convs.0.gn", self.conv(f"{at}.lateral_convs.0.conv", maps[0]))
        fine = fine + functional.interpolate(outs[-1], fine.shape[-2:], mode="bilinear", align_corners=False)
        fine = self.group_norm(
            f"{at}.output_convs.0.gn", self.conv(f"{at}.output_convs.0.conv", fine, padding=1)
        ).relu()
        return self.conv(f"{at}.mask_feature", fine), outs

    # transformer decoder

    def attention(self, name, query, key, value, hidden=None):
        """(B, Q, C) to (B, L, C); `hidden` (B, Q, L) is not looked at."""
        heads = self.sizes.attention_heads
        weight, bias = self.state[f"{name}.attn.in_proj_weight"], self.state[f"{name}.attn.in_proj_bias"]
        parts = zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
        q, k, v = ((x @ w.T + b).unflatten(-1, (heads, -1)).transpose(1, 2) for x, w, b in parts)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None], -math.inf)
        return self.linear(f"{name}.attn.out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def predict(self, query, features, size):
        at = "panoptic_head"
        normed = self.norm(f"{at}.transformer_decoder.post_norm", query)
        embedded = self.linear(f"{at}.mask_embed.0", normed).relu()
        embedded = self.linear(f"{at}.mask_embed.4", self.linear(f"{at}.mask_embed.2", embedded).relu())
        masks = torch.einsum("bqc,bchw->bqhw", embedded, features)
        small = functional.interpolate(masks, size, mode="bilinear", align_corners=False).flatten(2)
        hidden = small.sigmoid() < 0.5
        hidden[hidden.all(-1)] = False
        return self.linear(f"{at}.cls_embed", normed), masks, hidden

    def forward(self, images):
        """Class logits (B, Q, classes + 1) and mask logits (B, Q, H / 4, W / 4) of the last layer."""
        features, outs = self.pixels(self.swin(images))
        at = "panoptic_head"
        memories, positions = [], []
        for level, out in enumerate(outs):
            memories.append(out.flatten(2).transpose(1, 2) + self.state[f"{at}.level_embed.weight"][level])
            positions.append(self.sine(*out.shape[-2:]).flatten(1).T)
        b = len(images)
        query = self.state[f"{at}.query_feat.weight"].expand(b, -1, -1)
        place = self.state[f"{at}.query_embed.weight"]
        classes, masks, hidden = self.predict(query, features, outs[0].shape[-2:])
        for layer in range(self.sizes.decoder):
            name, level = f"{at}.transformer_decoder.layers.{layer}", layer % LEVELS
            memory = memories[level]
            crossed = self.attention(f"{name}.attentions.0", query + place, memory + positions[level], memory, hidden)
            query = self.norm(f"{name}.norms.0", query + crossed)
            own = self.attention(f"{name}.attentions.1", query + place, query + place, query)
            query = self.norm(f"{name}.norms.1", query + own)
            fed = self.linear(f"{name}.ffns.0.layers.1", self.linear(f"{name}.ffns.0.layers.0.0", query).relu())
            query = self.norm(f"{name}.norms.2", query + fed)
            classes, masks, hidden = self.predict(query, features, outs[(layer + 1) % LEVELS].shape[-2:])
        return classes, masks
