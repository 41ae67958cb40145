"""What is compared: ten published designs, and controls that differ less from one of them than the others do.

A design is a digits recipe of `lightning_configs/models` and what is changed in it. The budget of a `World` is laid over
every one of them, so that backbone, documents, tokens a step and schedule are the same; rates and weights of losses are
each recipe's own. A world of other images brings its tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from experiments.designs.shapes import prompt, shown
from unimodal.data.digits import caption
from unimodal.evaluation import digits
from unimodal.evaluation.results import percent
from unimodal.evaluation.shapes import WORLD, GenEvalShapes, ShapesQuestions

CONFIGS = Path("lightning_configs")
Changes = dict[str, Any]
"""Nested keys; a dictionary with a class_path replaces what it meets, any other is laid over it, None takes a key away."""


def merged(base: Changes, changes: Changes) -> Changes:
    """`changes` laid over `base`, which stays as it was."""
    result = deepcopy(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict) and "class_path" not in value:
            result[key] = merged(result[key], value)
        else:
            result[key] = deepcopy(value)
    return result


def model(**changes: Any) -> Changes:
    """Changes of the model itself."""
    return {"model": {"init_args": {"model": changes}}}


def training(**changes: Any) -> Changes:
    """Changes of how it is trained."""
    return {"model": {"init_args": changes}}


@dataclass(frozen=True)
class First:
    """A stage before, over a share of the steps.

    Attributes:
        changes: of the design's recipe, beside the world's `reading`.
        handed: what the second stage starts from: the whole model, or its layers as a text model that experts begin as.
        kept: what of it does not learn any more.
        share: of the run's steps.
    """

    changes: Changes
    handed: Literal["model", "text"]
    kept: tuple[str, ...]
    share: float = 1 / 3


@dataclass(frozen=True)
class Design:
    """A recipe and its changes.

    Attributes:
        name: as the paper calls it, or what the control is.
        recipe: in lightning_configs/models.
        paper: where it comes from; of a control, what it is a control of.
        tokenizer: which of the world's recipes in lightning_configs/tokenizers is trained before; None: pixel patches.
        changes: laid over the recipe.
        first: the stage before, if it starts from a trained model.
    """

    name: str
    recipe: str
    paper: str
    tokenizer: str | None = None
    changes: Changes = field(default_factory=dict)
    first: First | None = None


@dataclass(frozen=True)
class Claim:
    """A published ordering: `better` above `worse` in a score.

    Attributes:
        also: what else the two differ in here; None: nothing, so that an ordering is due to what is claimed.
    """

    text: str
    better: str
    worse: str
    score: Literal["drawn", "read"]
    source: str
    also: str | None = None


_DENSE = {"backbone": {"experts": None}}
_TEXT = training(image_weight=0.0, freeze=["generator"])

DESIGNS = (
    Design("chameleon", "digits_chameleon_shared", "Chameleon, arXiv 2405.09818", "vq"),
    Design("janus", "digits_janus_decoupled", "Janus, arXiv 2410.13848", "vq"),
    Design("transfusion", "digits_transfusion_diffusion", "Transfusion, arXiv 2408.11039"),
    Design("bagel", "digits_mot_flow", "BAGEL, arXiv 2505.14683"),
    Design(
        "llamafusion", "digits_llamafusion", "LlamaFusion, arXiv 2412.15188",
        first=First(merged(_TEXT, model(**_DENSE)), "text", ("text", "embedding")),
    ),
    Design("show-o", "digits_showo_masked", "Show-o, arXiv 2408.12528", "vq"),
    Design("unifluid", "digits_mar_tokens", "UniFluid, arXiv 2503.13436"),
    Design("vargpt", "digits_var_nextscale", "VARGPT, arXiv 2501.12327", "multiscale"),
    Design("metamorph", "digits_metamorph_regression", "MetaMorph, arXiv 2412.14164", "diffused"),
    Design(
        "metaquery", "digits_metaquery", "MetaQuery, arXiv 2504.06256",
        first=First(_TEXT, "model", ("shared", "embedding", "vision", "connector"), 1 / 2),
    ),
    Design("flow-dense", "digits_mot_flow", "control of bagel: one expert", changes=model(**_DENSE)),
    Design(
        "flow-causal", "digits_mot_flow", "control of flow-dense: image tokens see those before them only",
        changes=model(**_DENSE, generator={"init_args": {"bidirectional": False}}),
    ),
    Design("janus-shared", "digits_vq_ar", "control of janus: images are read as they are drawn", "vq"),
)  # fmt: skip

_VQ = (
    "tokenizer, image tokens that see each other both ways, a copy of an image that is learned beside one that is read, "
    "one table for words and ids, rates, weight of the image loss, positions, noise on what is read, sampler"
)
CLAIMS = (
    Claim("flow above discrete tokens, drawing", "flow-dense", "chameleon", "drawn", "Transfusion", _VQ),
    Claim("diffusion above discrete tokens, drawing", "transfusion", "chameleon", "drawn", "Transfusion", _VQ),
    Claim("image blocks seen both ways above causal, drawing", "flow-dense", "flow-causal", "drawn", "Transfusion"),
    Claim("mixture of transformers above dense at equal active FLOPs, drawing", "bagel", "flow-dense", "drawn", "BAGEL"),
    Claim(
        "decoupled encoders above shared, reading", "janus", "janus-shared", "read", "Janus",
        "the encoder sees pixels, both ways, and has 0.13 M parameters of its own",
    ),
)  # fmt: skip
"""Published orderings; "drawn" and "read" are the world's own scores."""


@dataclass(frozen=True)
class World:
    """What is drawn and read, and how that is scored.

    Attributes:
        name: of folders, and how its tokenizers' recipes begin.
        image: pixels of an image's sides.
        patch: pixels of the sides of what a token of an image stands for.
        colours: channels of an image, 1 or 3.
        budget: laid over every recipe.
        reading: laid over a first stage: what is asked for in words and drawn teaches it nothing.
        scoring: the module that scores a run, and its arguments; it is given --run, --out, --seed and perhaps --compile, and
            leaves scores.json, samples.png (a row of 36 pixels for each of `prompts`) and, last, index.html.
        versions: of what scores; rows of others are refused.
        prompts: ten, shown in the gallery and timed.
        legend: of the gallery, in the report; none where the images need none.
        drawn: score of asked images, in `scores`.
        read: score of images put into words.
        scores: every share, and of how many independent answers it is.
        measures: every other number of a table: how it is called and written.
        noted: what a row keeps of scores.json beside the shares.
        step_flops: what equal FLOPs are, an optimizer step: about those of the cheapest designs, and a constant, so that
            rows compare whichever designs there are.
        steps: of a run.
        seeds: runs a design in full.
    """

    name: str
    image: int
    patch: int
    colours: int
    budget: Changes
    reading: Changes
    scoring: tuple[str, ...]
    versions: dict[str, int]
    prompts: tuple[str, ...]
    legend: str
    drawn: str
    read: str
    scores: dict[str, int]
    measures: dict[str, tuple[str, Callable[[float], str]]]
    noted: tuple[str, ...]
    step_flops: float
    steps: int
    seeds: int

    def tokenizer(self, design: Design) -> str | None:
        """Its recipe in lightning_configs/tokenizers, where one is trained."""
        return None if design.tokenizer is None else f"{self.name}_{design.tokenizer}"

    def components(self, design: Design, given: Changes) -> Changes:
        """What a recipe's tokenizer and vision encoder are for images of this size.

        Args:
            design: whose they are.
            given: the recipe's `model`.
        """
        name = self.tokenizer(design)
        if name is None:
            found: Changes = {"tokenizer": {"init_args": {"patch": self.patch, "colours": self.colours}}}
        else:
            own = yaml.safe_load((CONFIGS / "tokenizers" / f"{name}.yaml").read_text(encoding="utf-8"))
            found = {"tokenizer": own["model"]["init_args"]["tokenizer"]}
        if "vision" in given:
            found["vision"] = {"init_args": {"settings": {"img_size": self.image, "patch_size": self.patch}}}
        return model(**found)


def _budget(image: int, data: Changes, **rules: Any) -> Changes:
    backbone = {"width": 128, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_width": 344, "vocabulary": 512}
    sequence = {"image_sizes": [[image, image]], **rules, "drop_text": 0.1, "drop_images": 0.0}
    rest = {"warmup_steps": 100, "schedule": "constant", "lr_floor": None, "weight_decay": 0.05, "ema_decay": 0.995}
    # Steps, where to and how often are the runner's.
    trainer = {"precision": "32-true", "gradient_clip_val": 1.0, "enable_progress_bar": False}
    trainer |= dict.fromkeys(("max_steps", "val_check_interval", "default_root_dir"))
    return {
        "model": {"init_args": {"model": {"backbone": backbone, "sequence": sequence}, **rest}},
        "data": data,
        "trainer": trainer,
        "checkpoint": None,
    }


def _mixture(**shares: float) -> Changes:
    return {"data": {"init_args": {"mixture": shares}}}


DIGITS = World(
    "digits", image=8, patch=2, colours=1,
    budget=_budget(
        8, {"class_path": "unimodal.data.DigitsData", "init_args": {"batch_tokens": 4096}}, context_length=256
    ),
    reading=_mixture(text_to_image=0.0, image_to_text=1.0, sum=1.0, text=0.1),
    scoring=("unimodal.cli", "evaluate", "digits"), versions={"digits": digits.VERSION},
    prompts=tuple(caption(digit) for digit in range(10)), legend="",
    drawn="asked_digit", read="image_to_text",
    scores={"asked_digit": 500, "image_to_text": 374, "sums_text": 200, "sums_drawn": 200},
    measures={
        "frechet": ("Frechet (pixels64)", "{:.0f}".format), "recall": ("recall", "{:.2f}".format),
        "copies": ("copies", percent),
    },
    noted=("frechet", "frechet_real", "recall", "copies", "guidance"),
    step_flops=19.66e9, steps=1200, seeds=3,
)  # fmt: skip

_SHARES = {"text_to_image": 4.0, "image_to_text": 1.0, "question": 2.0, "edit": 0.0, "count": 0.0, "steps": 0.0}
_ASKED = tuple(prompt(item) for item in shown(GenEvalShapes()))
SHAPES = World(
    "shapes", image=32, patch=4, colours=3,
    budget=_budget(
        32, {"class_path": "unimodal.data.ShapesData", "init_args": {"batch_tokens": 4096, "mixture": _SHARES}},
        # An image that ends a document needs no clean copy, which would take half of a step's tokens.
        context_length=640, learn_end=False,
    ),
    reading=_mixture(**{**_SHARES, "text_to_image": 0.0}),
    scoring=("experiments.designs.shapes",),
    versions={"world": WORLD} | {one.name: one.version for one in (GenEvalShapes, ShapesQuestions)}, prompts=_ASKED,
    legend=f"`gallery.png`: first draws of {', '.join(text.removeprefix('a photo of ') for text in _ASKED)}; then others.",
    drawn="geneval_shapes", read="shapes_questions",
    scores={"geneval_shapes": 178, "shapes_questions": 500},  # four images of a prompt are not four answers
    measures={"frechet": ("Frechet (pixels192)", "{:.3f}".format), "recall": ("recall", "{:.2f}".format)},
    noted=("frechet", "frechet_real", "recall", "guidance"),
    step_flops=20.0e9, steps=1200, seeds=1,
)  # fmt: skip
WORLDS = {world.name: world for world in (DIGITS, SHAPES)}


def recipe(design: Design, world: World, changes: Changes) -> Changes:
    """The whole of what `unimodal fit` reads."""
    base = yaml.safe_load((CONFIGS / "models" / f"{design.recipe}.yaml").read_text(encoding="utf-8"))
    components = world.components(design, base["model"]["init_args"]["model"])
    for more in (world.budget, components, design.changes, changes):
        base = merged(base, more)
    return base


def chosen(names: list[str] | None) -> tuple[Design, ...]:
    """Designs by name, in the table's order; ValueError where there is none of that name."""
    known = [design.name for design in DESIGNS]
    for name in names or ():
        if name not in known:
            raise ValueError(f"--only: expected some of {', '.join(known)}, got {name}")
    return tuple(design for design in DESIGNS if not names or design.name in names)
