"""Every setting a YAML may hold is typed: what is a dict or Any is not checked, and a misspelling passes."""

import dataclasses
import inspect
import types
import typing

import pytest

from unimodal.backbone import BackboneConfig, Experts
from unimodal.data import DigitImageData, DigitsData, FolderData, FolderImageData
from unimodal.model import UnifiedModel
from unimodal.packing import SequenceRules
from unimodal.training import TokenizerTraining, UnifiedTraining
from unimodal_generators import (
    Autoregressive,
    AutoregressiveSettings,
    ConvNeXtCoder,
    Diffusion,
    DiffusionSettings,
    Flow,
    FlowSettings,
    LinearCoder,
    NextScale,
    NextScaleSettings,
    UNetCoder,
)
from unimodal_tokenizers import MultiscaleVQ, PatchTokenizer, ResidualVQ, VQTokenizer

PUBLIC = [
    BackboneConfig, Experts, DigitImageData, DigitsData, FolderData, FolderImageData, UnifiedModel, SequenceRules,
    TokenizerTraining, UnifiedTraining, Autoregressive, AutoregressiveSettings, Flow, FlowSettings, PatchTokenizer,
    VQTokenizer, ConvNeXtCoder, Diffusion, DiffusionSettings, LinearCoder, UNetCoder, NextScale, NextScaleSettings,
    MultiscaleVQ, ResidualVQ,
]  # fmt: skip


def parts(annotation: object) -> list[object]:
    """An annotation and everything inside it."""
    return [annotation, *(p for a in typing.get_args(annotation) if not isinstance(a, list) for p in parts(a))]


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda c: c.__name__)
def test_no_setting_is_untyped(cls: type) -> None:
    hints = typing.get_type_hints(cls.__init__)
    for parameter in list(inspect.signature(cls).parameters.values()):
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL), parameter
        for part in parts(hints[parameter.name]):
            assert part not in (dict, typing.Any, object), f"{cls.__name__}.{parameter.name}: {hints[parameter.name]}"
            assert typing.get_origin(part) is not dict
            assert not isinstance(part, types.GenericAlias) or part.__origin__ is not dict


def test_what_is_expensive_to_get_wrong_has_no_default() -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(BackboneConfig)}
    for name in ("width", "depth", "heads", "kv_heads", "mlp_width", "vocabulary", "positions"):
        assert defaults[name] is dataclasses.MISSING
