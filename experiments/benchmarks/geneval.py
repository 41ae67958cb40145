"""GenEval's scoring: images a second of our batches against the structure of the official script, on the same networks.

The official structure: one image at a time, read from its file twice, detected alone with all masks made; then, for each
clause with a colour, a fresh loader with four worker processes over the crops of its objects. Networks, resizing and rules
are ours on both sides, so only the structure differs. Weights are random, made so that every image has objects to name.
"""

import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from experiments.benchmarks.cases import Case, Settings
from experiments.benchmarks.results import Result, speedup
from experiments.benchmarks.timing import interleave
from unimodal.documents import GENERATED, Part
from unimodal.evaluation.benchmark import Answer
from unimodal.evaluation.clip_colours import Clip, ClipColours, crop
from unimodal.evaluation.geneval import GenEval
from unimodal.evaluation.mask2former import LABELS, Mask2FormerDetector
from unimodal.images import load_image
from unimodal.importers.mmdet import WEIGHTS
from unimodal.metrics.detection import Detection
from unimodal.metrics.geneval import COLOURS, Record, colours_needed, decide, keep

BATCH = 32
_CAR, _BUS = {"class": "car", "count": 1}, {"class": "bus", "count": 1}
_PLAIN = {"tag": "two_object", "include": [_CAR, _BUS], "prompt": "a photo of a car and a bus"}
_ONE = {"tag": "colors", "include": [_CAR | {"color": "red"}], "prompt": "a photo of a red car"}
_TWO = {
    "tag": "color_attr",
    "include": [_CAR | {"color": "red"}, _BUS | {"color": "blue"}],
    "prompt": "a photo of a red car and a blue bus",
}
RECORDS = (_PLAIN, _ONE, _TWO, _PLAIN, _ONE, _TWO, *(_PLAIN,) * 5)
"""Tasks with no, one and two colours about as often as GenEval has them: 359, 94 and 100 of 553 prompts."""


# --- networks


def detector_folder(folder: Path, *, full: bool) -> Path:
    """A detector of the published size or a small one, that finds a car and a bus everywhere."""
    embed, depths, heads = (96, [2, 2, 18, 2], [3, 6, 12, 24]) if full else (12, [1, 1, 1, 1], [1, 2, 2, 4])
    width = 256 if full else 32
    swin = SwinConfig(
        embed_dim=embed, depths=depths, num_heads=heads, window_size=7, drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=width, mask_feature_size=width, hidden_dim=width, num_labels=len(LABELS),
        num_attention_heads=8, encoder_layers=6 if full else 1, decoder_layers=10 if full else 4,
        encoder_feedforward_dim=4 * width, dim_feedforward=8 * width, num_queries=100 if full else 8,
    )  # fmt: skip
    torch.manual_seed(0)
    network = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        network.class_predictor.weight.zero_()
        network.class_predictor.bias.fill_(-20)
        network.class_predictor.bias[[LABELS.index("car"), LABELS.index("bus")]] = 0
        masks = network.model.transformer_module.decoder.mask_predictor.mask_embedder
        for layer in (masks.layers[2].layers[0], network.model.pixel_level_module.decoder.mask_projection):
            layer.weight.zero_()
            layer.bias.fill_(1)  # so that every mask is the whole image
    config.save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, folder / WEIGHTS, {"source": "random", "source_sha256": "0" * 64})
    return folder


def random_clip(*, full: bool) -> Clip:
    """ViT-L/14, or a small one."""
    config: dict[str, Any] = dict(open_clip.get_model_config("ViT-L-14-quickgelu"))
    if not full:
        config["vision_cfg"] = {"image_size": 224, "layers": 2, "width": 64, "patch_size": 32}
        config["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    transform = image_transform_v2(PreprocessCfg(size=224), is_train=False)
    return Clip(open_clip.CLIP(**config), transform, open_clip.get_tokenizer("ViT-L-14-quickgelu"), "random")


# --- the two structures


class _Crops(Dataset[tuple[Tensor, int]]):
    def __init__(self, image: Image.Image, objects: Sequence[Detection], transform: Callable[[Image.Image], Tensor]):
        self.image, self.objects, self.transform = image, objects, transform

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(crop(self.image, self.objects[index])), 0


@torch.inference_mode()
def official_colours(colours: ClipColours, image: Image.Image, objects: Sequence[Detection]) -> list[str]:
    """The objects of one clause, through a loader of their own."""
    encode: Any = colours.clip.network.encode_image
    found: list[int] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create 4 worker processes")
        loader = DataLoader(_Crops(image, objects, colours.clip.transform), batch_size=16, num_workers=4)
        for crops, _ in loader:
            encoded = functional.normalize(encode(crops.to(colours.device)), dim=-1)
            found += (encoded @ colours._colours(objects[0].label).T).argmax(1).tolist()
    return [COLOURS[index] for index in found]


def official(paths: Sequence[Path], detector: Mask2FormerDetector, colours: ClipColours) -> list[bool]:
    """The script's loop over files."""
    records, verdicts = [Record.from_json(record) for record in RECORDS], []
    for number, path in enumerate(paths):
        record = records[number % len(records)]
        (found,) = detector.detect([load_image(path)], [0.0], [True])
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        kept = keep(found, record)
        named: dict[Detection, str] = {}
        needed = colours_needed(record, kept)
        for label in dict.fromkeys(detection.label for detection in needed):
            same = [detection for detection in needed if detection.label == label]
            named |= dict(zip(same, official_colours(colours, image, same), strict=True))
        verdicts.append(decide(record, kept, named.__getitem__).correct)
    return verdicts


def ours(paths: Sequence[Path], benchmark: GenEval) -> list[bool]:
    """What `unimodal evaluate geneval` does with the same files."""
    items, verdicts = benchmark.items(), []
    for start in range(0, len(paths), BATCH):
        answers = [
            Answer(items[number % len(items)], number, (Part(load_image(path), role=GENERATED),), (path.name,))
            for number, path in enumerate(paths[start : start + BATCH], start=start)
        ]
        verdicts += [verdict.score == 1 for verdict in benchmark.judge(answers)]
    return verdicts


def geneval_scoring(settings: Settings) -> Result:
    """Images a second, ours over the official structure's."""
    full = settings.device == "cuda" and not settings.quick
    number, side = settings.size((66 if full else 22, 512), (3, 64))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        detector = Mask2FormerDetector(detector_folder(folder / "detector", full=full), settings.device)
        colours = ClipColours(random_clip(full=full), settings.device)
        (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
        benchmark = GenEval(folder / "prompts.jsonl", prompts="other", golden=False, samples=number)
        benchmark.detector, benchmark.colours = detector, colours
        paths = [folder / f"{index:05d}.png" for index in range(number)]
        rng = np.random.default_rng(0)
        for path in paths:
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(path)
        way, peer = partial(ours, paths, benchmark), partial(official, paths, detector, colours)
        different = float(np.mean(np.array(way()) != np.array(peer())))  # their warm-up too
        repeats = min(settings.repeats, 3)
        times = interleave({"ours": way, "official": peer}, repeats, warmup=0, wait=settings.wait)
    return speedup(
        times["ours"], times["official"], peer="the official script's structure, same networks", correct=different,
        tolerance=0.0, note="networks of the published sizes" if full else "small networks, so workers weigh more",
        extra={"images": number, "side": side, "images_per_second": number / times["ours"].best},
    )  # fmt: skip


CASES: dict[str, Case] = {"geneval_scoring": geneval_scoring}
