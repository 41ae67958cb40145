"""Published weights: a folder gives what the class that wrote it gives, and nothing else is taken."""

import json
import math
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError
from published_cases import CASES, CONTINUOUS, DISCRETE, WAN, autoencoder_kl, autoencoder_wan_of_patches, janus
from safetensors.torch import load_file, save_file

from unimodal.cli import main
from unimodal.export import ExportInfo, load_export, save_export
from unimodal_tokenizers import (
    ChameleonTokenizer,
    Grid,
    ImageTokens,
    JanusTokenizer,
    KLTokenizer,
    MagvitTokenizer,
    from_pretrained,
)
from unimodal_tokenizers.quantizers.search import nearest_code_of_any_length

INFO = ExportInfo("tokenizer", "raw", "test", "unknown")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A folder of each published class, and the original that wrote it."""
    root = tmp_path_factory.mktemp("published")
    return {name: (root / name, case.save(root / name)) for name, case in CASES.items()}


def images(count: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def copied(source: Path, target: Path, **changes: Any) -> Path:
    """A folder again, keys of its config changed; None takes one away."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    record = json.loads((target / "config.json").read_text()) | changes
    record = {key: value for key, value in record.items() if value is not None or key not in changes}
    (target / "config.json").write_text(json.dumps(record))
    return target


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", CASES)
def test_the_layout_is_the_published_one(name: str, saved: dict[str, Any]) -> None:
    layout = from_pretrained(str(saved[name][0])).layout
    assert (layout.kind, layout.dim, layout.stride, layout.codebooks) == CASES[name].layout


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_encoding_is_that_of_the_original(name: str, saved: dict[str, Any]) -> None:
    """Row by row over the grid; where images may be of any shape, of one that is not square."""
    folder, original = saved[name]
    tokenizer, width = from_pretrained(str(folder)), 16 if name == "AutoencoderRAE" else 8
    expected = CASES[name].encode(original, images(width=width))
    if expected.dim() == 4:
        expected = expected.flatten(2).mT  # (B, D, h, w) -> (B, N, D)
    found = tokenizer.encode(images(width=width))
    assert found.grids == (tokenizer.layout.grid(16, width),) * 2
    torch.testing.assert_close(found.values, expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
    if found.values.dtype == torch.int64:
        assert len(found.values.unique()) > 4  # not the same code everywhere


@pytest.mark.parametrize("name", [name for name in CASES if name != "ChameleonVQVAE"])
@torch.no_grad()
def test_decoding_is_that_of_the_original(name: str, saved: dict[str, Any]) -> None:
    folder, original = saved[name]
    tokenizer = from_pretrained(str(folder))
    tokens, latents = tokenizer.encode(images()), CASES[name].encode(original, images())
    torch.testing.assert_close(tokenizer.decode(tokens), CASES[name].decode(original, latents), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_images_together_are_images_alone(name: str, saved: dict[str, Any]) -> None:
    tokenizer = from_pretrained(str(saved[name][0]))
    tokens = tokenizer.encode(images())
    alone = [tokenizer.encode(image[None]) for image in images()]
    torch.testing.assert_close(tokens.values, ImageTokens.cat(alone).values, atol=1e-5, rtol=1e-5)
    drawn = torch.cat([tokenizer.decode(one) for one in alone])
    torch.testing.assert_close(tokenizer.decode(tokens), drawn, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DISCRETE)
def test_every_id_comes_back_from_its_code(name: str, saved: dict[str, Any]) -> None:
    tokenizer = from_pretrained(str(saved[name][0]))
    ids = torch.arange(tokenizer.layout.codebooks[0])
    codes = tokenizer.lookup(ids)
    assert codes.shape == (len(ids), tokenizer.layout.dim)
    assert torch.equal(tokenizer.vectors_to_ids(codes), ids)


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLWan"])
@torch.no_grad()
def test_a_generator_samples_the_posterior(name: str, saved: dict[str, Any]) -> None:
    folder, original = saved[name]
    tokenizer = from_pretrained(str(folder))
    x = images()[:, :, None] if name == "AutoencoderKLWan" else images()
    z = original.encode(x).latent_dist.sample(torch.Generator().manual_seed(3)).flatten(2).mT  # (B, N, D)
    expected = (z - tokenizer.shift[:, 0, 0]) * tokenizer.scale[:, 0, 0]
    found = tokenizer.encode(images(), torch.Generator().manual_seed(3)).values
    torch.testing.assert_close(found, expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, tokenizer.encode(images()).values)


@torch.no_grad()
def test_a_video_autoencoder_may_see_squares_of_pixels(tmp_path: Path) -> None:
    network = autoencoder_wan_of_patches(tmp_path)
    tokenizer = from_pretrained(str(tmp_path))
    assert (tokenizer.layout.stride, tokenizer.layout.dim) == (4, 4)
    x = images()
    tokens = tokenizer.encode(x)
    z = network.encode(x[:, :, None]).latent_dist.mode().flatten(2).mT
    expected = (z - torch.tensor(WAN["latents_mean"])) / torch.tensor(WAN["latents_std"])
    torch.testing.assert_close(tokens.values, expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
    drawn = tokenizer.decode(tokens)
    assert drawn.shape == x.shape
    torch.testing.assert_close(drawn, network.decode(network.encode(x[:, :, None]).latent_dist.mode()).sample[:, :, 0])


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_published_weights_moves(name: str, saved: dict[str, Any]) -> None:
    tokenizer = from_pretrained(str(saved[name][0])).train()
    if name != "AutoencoderKL":  # which may go on learning
        assert not tokenizer.network.training
        assert not any(parameter.requires_grad for parameter in tokenizer.network.parameters())
    else:
        tokenizer = from_pretrained(str(saved[name][0]))
        assert tokenizer.training  # fit leaves modules in the mode they come in, and here noise depends on it
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    tokenizer.decode(tokenizer.encode(images()))
    assert all(torch.equal(value, before[key]) for key, value in tokenizer.state_dict().items())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_an_export_needs_the_folder_no_more(name: str, saved: dict[str, Any], tmp_path: Path) -> None:
    source = copied(saved[name][0], tmp_path / "source")
    tokenizer = from_pretrained(str(source)).eval()  # as an export is loaded
    config = {"class_path": "unimodal_tokenizers.from_pretrained", "init_args": {"source": str(source)}}
    save_export(tmp_path / "export", tokenizer, config, INFO)
    for path in source.iterdir():
        path.unlink()
    loaded = load_export(tmp_path / "export", "tokenizer")
    assert loaded.layout == tokenizer.layout
    tokens = tokenizer.encode(images())
    assert torch.equal(loaded.encode(images()).values, tokens.values)
    assert torch.equal(loaded.decode(tokens), tokenizer.decode(tokens))


def test_codes_of_any_length_are_compared_on_the_unit_sphere(tmp_path: Path) -> None:
    """As LlamaGen trains them; the class of transformers compares them as they are stored."""
    original = janus(tmp_path / "janus")
    original.quantize.embedding.weight.data *= 0.2 + torch.rand(32, 1, generator=torch.Generator().manual_seed(0))
    original.save_pretrained(tmp_path / "janus")
    tokenizer = from_pretrained(str(tmp_path / "janus"))
    assert isinstance(tokenizer, JanusTokenizer)
    z = torch.randn(500, 4, generator=torch.Generator().manual_seed(2))
    stored = original.quantize.embedding.weight.detach()
    expected = torch.cosine_similarity(z[:, None], stored[None], dim=-1).argmax(-1)
    assert torch.equal(tokenizer.vectors_to_ids(z), expected)
    assert not torch.equal(nearest_code_of_any_length(z, stored), expected)
    assert torch.equal(tokenizer.vectors_to_ids(tokenizer.lookup(torch.arange(32))), torch.arange(32))


def test_a_tokenizer_inside_a_whole_model(saved: dict[str, Any], tmp_path: Path) -> None:
    """Of shards that an index lists, only those are opened that hold some of it."""
    folder, _ = saved["JanusVQVAE"]
    settings = json.loads((folder / "config.json").read_text())
    weights = load_file(weights_of(folder))
    record = {"architectures": ["JanusForConditionalGeneration"], "model_type": "janus", "vq_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(record))
    other = {"lm_head.weight": "model-1.safetensors", "model.vision_model.x": "model-1.safetensors"}
    names = list(weights)
    listed = {f"model.vqmodel.{name}": f"model-{2 + (i % 2)}.safetensors" for i, name in enumerate(names)}
    for number in (2, 3):
        part = {f"model.vqmodel.{name}": weights[name] for name in names[number - 2 :: 2]}
        save_file(part | {"model.other": torch.zeros(1)}, tmp_path / f"model-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": other | listed}))
    whole, alone = from_pretrained(str(tmp_path)), from_pretrained(str(folder))
    assert torch.equal(whole.encode(images()).values, alone.encode(images()).values)


def test_the_older_names_of_attention(saved: dict[str, Any], tmp_path: Path) -> None:
    """Those under which Stable Diffusion 1 was published."""
    folder = copied(saved["AutoencoderKL"][0], tmp_path / "old")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = load_file(weights_of(folder))
    renamed = {}
    for name, tensor in weights.items():
        for new, before in old.items():
            name = name.replace(new, before)
        renamed[name] = tensor
    assert renamed.keys() != weights.keys()
    save_file(renamed, weights_of(folder))
    new = from_pretrained(str(saved["AutoencoderKL"][0]))
    assert torch.equal(from_pretrained(str(folder)).encode(images()).values, new.encode(images()).values)


def test_half_precision_is_read_as_single(saved: dict[str, Any], tmp_path: Path) -> None:
    folder = copied(saved["AutoencoderKL"][0], tmp_path / "half")
    save_file({name: t.bfloat16() for name, t in load_file(weights_of(folder)).items()}, weights_of(folder))
    assert from_pretrained(str(folder)).encode(images()).values.dtype == torch.float32


def test_a_mean_and_a_deviation_of_each_channel(tmp_path: Path) -> None:
    """As Playground has them beside a scale: (z - mean) * scale / deviation."""
    mean, std = [0.1, -0.3, 0.2, 0.5], [1.0, 2.0, 4.0, 0.5]
    original = autoencoder_kl(tmp_path, latents_mean=mean, latents_std=std, scaling_factor=0.5, shift_factor=None)
    with torch.no_grad():
        z = original.encode(images()).latent_dist.mode().flatten(2).mT.flatten(0, 1)  # (T, D)
    expected = (z - torch.tensor(mean)) * 0.5 / torch.tensor(std)
    torch.testing.assert_close(from_pretrained(str(tmp_path)).encode(images()).values, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Emu3VQVAE", "JanusVQVAE", "ChameleonVQVAE"])
def test_codes_are_searched_in_single_precision(name: str, saved: dict[str, Any]) -> None:
    tokenizer = from_pretrained(str(saved[name][0])).eval()
    vectors = torch.randn(4000, tokenizer.layout.dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ids = tokenizer.vectors_to_ids(vectors)
    assert torch.equal(ids, tokenizer.vectors_to_ids(vectors))


def test_chameleon_takes_a_decoder_or_trains_one(saved: dict[str, Any], tmp_path: Path) -> None:
    folder = copied(saved["ChameleonVQVAE"][0], tmp_path / "with")
    torch.manual_seed(5)
    first = from_pretrained(str(saved["ChameleonVQVAE"][0]))
    assert isinstance(first, ChameleonTokenizer)
    decoder = {f"decoder.{name}": tensor for name, tensor in first.decoder.state_dict().items()}
    save_file({**load_file(weights_of(folder)), **decoder}, weights_of(folder))
    second = from_pretrained(str(folder))
    tokens = first.encode(images())
    assert torch.equal(first.decode(tokens), second.decode(tokens))
    result = first.train()(images())
    torch.testing.assert_close(result.images, first.decode(tokens), atol=1e-5, rtol=1e-5)
    assert result.counts is not None
    assert int(result.counts.sum()) == len(tokens.values)
    result.images.sum().backward()
    assert all(p.grad is not None for p in first.decoder.parameters())
    assert first.last_layer.shape[0] == 3
    save_file({**load_file(weights_of(folder)), "decoder.extra": torch.zeros(1)}, weights_of(folder))
    with pytest.raises(ValueError, match="do not fit the decoder: extra is unknown"):
        from_pretrained(str(folder))


# --- what is refused


def test_scale_and_shift_are_never_guessed(tmp_path: Path) -> None:
    """A config of Stable Diffusion 1 has neither, one of SDXL no shift; null says that there is none."""
    autoencoder_kl(tmp_path / "flux")
    neither = copied(tmp_path / "flux", tmp_path / "sd1", scaling_factor=None, shift_factor=None)
    with pytest.raises(ValueError, match=r"scale, shift: expected numbers, got none.*AutoencoderKL"):
        from_pretrained(str(neither))
    with pytest.raises(ValueError, match=r"^shift: expected"):
        from_pretrained(str(neither), scale=0.18215)
    tokenizer = from_pretrained(str(neither), scale=0.18215, shift=0.0)
    assert isinstance(tokenizer, KLTokenizer)
    torch.testing.assert_close(tokenizer.scale.flatten(), torch.tensor([0.18215]))
    null = copied(neither, tmp_path / "sdxl", scaling_factor=0.13025)
    record = json.loads((null / "config.json").read_text()) | {"shift_factor": None}
    (null / "config.json").write_text(json.dumps(record))
    assert from_pretrained(str(null)).shift.item() == 0
    assert from_pretrained(str(tmp_path / "flux"), scale=2.0).scale.item() == 2.0  # what is given goes first


def test_an_import_says_how_scale_and_shift_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    autoencoder_kl(tmp_path / "flux")
    source, out = copied(tmp_path / "flux", tmp_path / "sd1", scaling_factor=None, shift_factor=None), tmp_path / "out"
    assert main(["import", "tokenizer", str(source), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "scale, shift: expected numbers, got none" in line
    assert "class_path unimodal_tokenizers.from_pretrained and init_args {source, scale, shift}" in line
    assert "Namespace" not in line
    settings = {"source": str(source), "scale": 0.18215, "shift": 0.0}
    record = {"class_path": "unimodal_tokenizers.from_pretrained", "init_args": settings}
    (tmp_path / "sd1.yaml").write_text(json.dumps(record))
    assert main(["import", "tokenizer", str(tmp_path / "sd1.yaml"), "--out", str(out)]) == 0
    assert isinstance(load_export(out, "tokenizer"), KLTokenizer)


@pytest.mark.parametrize(
    ("name", "gone"),
    [("AutoencoderDC", "scaling_factor"), ("AutoencoderKLWan", "latents_mean"), ("AutoencoderRAE", "latents_std")],
)
def test_every_latent_needs_its_scale(name: str, gone: str, saved: dict[str, Any], tmp_path: Path) -> None:
    folder = copied(saved[name][0], tmp_path / "without", **{gone: None})
    with pytest.raises(ValueError, match=f"scale.*expected numbers, got none.*{name}"):
        from_pretrained(str(folder))


def test_scale_is_for_latents(saved: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"scale, shift: expected none for the ids of JanusVQVAE, got 0\.5 and None"):
        from_pretrained(str(saved["JanusVQVAE"][0]), scale=0.5)
    with pytest.raises(ValueError, match=r"^shift: expected 1 number or 4"):
        from_pretrained(str(saved["AutoencoderKL"][0]), shift=[0.0, 1.0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shift": math.inf}, "^shift: expected finite numbers, got inf$"),
        ({"shift": [0.0, 0.0, 0.0, math.nan]}, "^shift: expected finite numbers, got nan$"),
        ({"scale": 0.0}, r"^scale: expected finite numbers other than 0, got 0\.0$"),
    ],
)
def test_scale_and_shift_are_finite_numbers(given: dict[str, Any], message: str, saved: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        from_pretrained(str(saved["AutoencoderKL"][0]), **given)


def test_a_config_s_scale_and_shift_are_finite_numbers(saved: dict[str, Any], tmp_path: Path) -> None:
    changes = {
        "AutoencoderKL": ("scaling_factor", "a", "other than 0, got 'a'"),
        "AutoencoderKLWan": ("latents_std", [1.0, 0.0, 1.0, 1.0], r"other than 0, got 0\.0"),
        "AutoencoderDC": ("scaling_factor", 0, "other than 0, got 0"),
    }
    for name, (key, value, message) in changes.items():
        folder = copied(saved[name][0], tmp_path / name, **{key: value})
        with pytest.raises(ValueError, match=rf"^source: .*config\.json: {key}: expected finite numbers {message}$"):
            from_pretrained(str(folder))
    infinite = copied(saved["AutoencoderKLWan"][0], tmp_path / "infinite", latents_mean=[math.inf, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="latents_mean: expected finite numbers, got inf"):
        from_pretrained(str(infinite))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no object"),
        ("{}", "weight_map: expected the file of each weight, got None"),
        ('{"weight_map": ["a"]}', r"weight_map: expected the file of each weight, got \['a'\]"),
        ('{"weight_map": {"a": 1}}', r"weight_map: expected the file of each weight, got \{'a': 1\}"),
    ],
)
def test_a_broken_index_is_named(content: str, message: str, saved: dict[str, Any], tmp_path: Path) -> None:
    folder = copied(saved["AutoencoderKL"][0], tmp_path / "sharded")
    weights_of(folder).unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^source: .*model\.safetensors\.index\.json:? {message}"):
        from_pretrained(str(folder))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_latent_of_other_channels_is_refused(name: str, saved: dict[str, Any]) -> None:
    tokenizer = from_pretrained(str(saved[name][0]))
    grid = tokenizer.layout.grid(16, 16)
    with pytest.raises(ValueError, match=r"tokens: expected \(N, D\)"):
        tokenizer.decode(ImageTokens(torch.zeros(grid.length, tokenizer.layout.dim + 1), (grid,)))
    with pytest.raises(ValueError, match="tokens: expected vectors"):
        tokenizer.lookup(torch.zeros(1, tokenizer.layout.dim + 1))


@pytest.mark.parametrize("name", DISCRETE)
def test_an_id_outside_the_codebook_is_refused(name: str, saved: dict[str, Any]) -> None:
    tokenizer = from_pretrained(str(saved[name][0]))
    with pytest.raises(ValueError, match="tokens: expected ids from 0 to 31, got 0 to 32"):
        tokenizer.decode(ImageTokens(torch.tensor([0, 1, 2, 32]), (Grid(2, 2),)))
    with pytest.raises(ValueError, match="tokens: expected integer ids"):
        tokenizer.lookup(torch.zeros(3))
    with pytest.raises(ValueError, match=r"tokens: expected ids \(T,\)"):
        tokenizer.lookup(torch.zeros(3, 2, dtype=torch.int64))


@pytest.mark.parametrize("name", CASES)
def test_an_image_that_the_stride_does_not_divide_is_refused(name: str, saved: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="image size: expected multiples of the stride"):
        from_pretrained(str(saved[name][0])).encode(images(height=15))


def test_a_representation_reads_images_of_one_size(saved: dict[str, Any]) -> None:
    tokenizer = from_pretrained(str(saved["AutoencoderRAE"][0]))
    with pytest.raises(ValueError, match="image size: expected 16x16 pixels alone, got 16x8"):
        tokenizer.encode(images(width=8))
    with pytest.raises(ValueError, match="image size: expected 16x16 pixels alone, got 16x24"):
        tokenizer.decode(ImageTokens(torch.zeros(6, 64), (Grid(2, 3),)))


def test_weights_of_another_tokenizer_are_refused(saved: dict[str, Any], tmp_path: Path) -> None:
    pairs = {"JanusVQVAE": "ChameleonVQVAE", "AutoencoderKL": "AutoencoderDC", "MAGVITv2": "Emu3VQVAE"}
    for name, other in pairs.items():
        folder = copied(saved[name][0], tmp_path / name)
        weights_of(folder).write_bytes(weights_of(saved[other][0]).read_bytes())
        with pytest.raises(ValueError, match=r"the weights of .* do not fit .*Tokenizer: .* is (missing|unknown)"):
            from_pretrained(str(folder))
    wider = copied(saved["JanusVQVAE"][0], tmp_path / "wider", num_embeddings=64)
    with pytest.raises(ValueError, match=r"quantize.embedding.weight has shape \[32, 4\], expected \[64, 4\]"):
        from_pretrained(str(wider))


def test_a_folder_must_hold_safetensors(saved: dict[str, Any], tmp_path: Path) -> None:
    pickled = copied(saved["AutoencoderKL"][0], tmp_path / "pickled")
    weights = weights_of(pickled)
    torch.save(load_file(weights), pickled / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="got pickled weights, which are not read"):
        from_pretrained(str(pickled))
    (pickled / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"expected diffusion_pytorch_model\.safetensors or .* got none of them"):
        from_pretrained(str(pickled))
    broken = copied(saved["AutoencoderKL"][0], tmp_path / "broken")
    weights_of(broken).write_bytes(weights_of(broken).read_bytes()[:300])
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        from_pretrained(str(broken))
    sharded = copied(saved["AutoencoderKL"][0], tmp_path / "sharded")
    weights_of(sharded).unlink()
    index = {"weight_map": {"a": "../pickled/model.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected safetensors of the folder"):
        from_pretrained(str(sharded))


def test_a_config_must_say_a_class_and_its_settings(saved: dict[str, Any], tmp_path: Path) -> None:
    source, _ = saved["AutoencoderKL"]
    with pytest.raises(ValueError, match=r"config\.json: expected one of the classes AutoencoderKL, .*got UNet2DModel"):
        from_pretrained(str(copied(source, tmp_path / "other", _class_name="UNet2DModel")))
    with pytest.raises(ValueError, match=r"config\.json: options: expected settings of AutoencoderKL, got depth"):
        from_pretrained(str(copied(source, tmp_path / "unknown", depth=3)))
    with pytest.raises(ValueError, match=r"options: expected a network that reads and draws 3 channels, got 4"):
        from_pretrained(str(copied(source, tmp_path / "colours", in_channels=4)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        from_pretrained(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        from_pretrained(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds no object"):
        from_pretrained(str(tmp_path / "empty"))


# --- the hub


def test_a_folder_asks_nobody(saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise AssertionError("a download")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    from_pretrained(str(saved["JanusVQVAE"][0]))
    with pytest.raises(ValueError, match="expected a folder or hub:OWNER/NAME, got owner/name, which is no folder"):
        from_pretrained("owner/name")
    for wrong in ("hub:owner", "hub:owner/name/../other", "hub:/owner/name", "hub:owner/name@"):
        with pytest.raises(ValueError, match="source: expected hub:OWNER/NAME"):
            from_pretrained(wrong)


def test_the_hub_is_asked_for_config_and_weights_alone(saved: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = saved["AutoencoderKL"][0], []

    def download(repository: str, name: str, *, subfolder: str | None, revision: str | None) -> str:
        asked.append((repository, name, subfolder, revision))
        if not (folder / name).is_file():
            raise RemoteEntryNotFoundError(f"404 {name}", response=huggingface_hub.errors.httpx.Response(404))
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = from_pretrained("hub:owner/flux.1/vae@refs/pr/3")
    assert torch.equal(found.encode(images()).values, from_pretrained(str(folder)).encode(images()).values)
    assert {(repository, sub, revision) for repository, _, sub, revision in asked} == {
        ("owner/flux.1", "vae", "refs/pr/3")
    }
    assert {name for _, name, _, _ in asked} == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OSError("no route\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match=r"^source: hub:owner/name: config.json cannot be downloaded: no route$"):
        from_pretrained("hub:owner/name")


def test_show_o_s_tokenizer_at_its_published_size() -> None:
    """Of its 382 tensors two are tables; widths, blocks and bits are the defaults."""
    with torch.device("meta"):
        tokenizer = MagvitTokenizer()
    assert (tokenizer.layout.dim, tokenizer.layout.stride, tokenizer.layout.codebooks) == (13, 16, (8192,))
    assert len(tokenizer.network.state_dict()) + 2 == 382
    assert sum(parameter.numel() for parameter in tokenizer.network.parameters()) == 95_387_004
