"""Every setting a YAML may hold is typed: what is a dict or Any is not checked, and a misspelling passes."""

import dataclasses
import enum
import inspect
import types
import typing

import pytest

import unimodal.data
import unimodal.training
import unimodal.vision
import unimodal_generators
import unimodal_tokenizers
from unimodal.backbone import BackboneConfig, Experts
from unimodal.model import UnifiedModel
from unimodal.sequence_rules import SequenceRules
from unimodal.training import TokenizerTraining, UnifiedTraining

ROOMS = (unimodal.data, unimodal.training, unimodal.vision, unimodal_generators, unimodal_tokenizers)
FREE = ("options", "settings")
"""Names of what is handed on as it is to timm, diffusers and transformers, which refuse what they do not take."""
NAMED = {
    "MixtureData.sources", "MixtureData.validation", "MixtureImageData.sources", "MixtureImageData.validation",
    "TokenData.weights", "TokenizerTraining.weights",
}  # fmt: skip
"""Values by a name, which is the user's own or which the class refuses where it knows none of that name."""


def settable(cls: object) -> bool:
    """Whether a YAML may build it: no protocol, no abstract base, nothing that is an exception or an enumeration."""
    return (
        isinstance(cls, type)
        and not issubclass(cls, tuple)  # records that code passes on
        and not inspect.isabstract(cls)
        and not getattr(cls, "_is_protocol", False)
        and not issubclass(cls, enum.Enum | Exception)
    )


PUBLIC = sorted(
    {getattr(room, name) for room in ROOMS for name in room.__all__ if settable(getattr(room, name))}
    | {BackboneConfig, Experts, UnifiedModel, SequenceRules, TokenizerTraining, UnifiedTraining},
    key=lambda cls: cls.__name__,
)


def test_what_recipes_are_made_of_is_looked_at() -> None:
    assert {"Masked", "ParallelNext", "Queries", "DiT", "VisionEncoder", "Representation", "ShapesData"} <= {
        cls.__name__ for cls in PUBLIC
    }


def parts(annotation: object) -> list[object]:
    """An annotation and everything inside it."""
    return [annotation, *(p for a in typing.get_args(annotation) if not isinstance(a, list) for p in parts(a))]


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda c: c.__name__)
def test_no_setting_is_untyped(cls: type) -> None:
    hints = typing.get_type_hints(cls.__init__)
    for parameter in list(inspect.signature(cls).parameters.values()):
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL), parameter
        if parameter.name in FREE:
            continue
        named = f"{cls.__name__}.{parameter.name}" in NAMED
        for part in parts(hints[parameter.name]):
            assert part not in (dict, typing.Any, object), f"{cls.__name__}.{parameter.name}: {hints[parameter.name]}"
            assert named or typing.get_origin(part) is not dict
            assert named or not isinstance(part, types.GenericAlias) or part.__origin__ is not dict


def test_what_is_expensive_to_get_wrong_has_no_default() -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(BackboneConfig)}
    for name in ("width", "depth", "heads", "kv_heads", "mlp_width", "vocabulary", "positions"):
        assert defaults[name] is dataclasses.MISSING
