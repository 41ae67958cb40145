"""Sampling settings as command lines give them."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from unimodal_generators.base import SamplingSettings

FLAGS = ("guidance", "image_guidance", "steps", "solver", "shift", "temperature", "top_k", "top_p")
"""Settings that have an option of their own; `--set NAME=VALUE` reaches every other that YAML can write (rules of shifts are
keys of recipes)."""


def overridden(settings: SamplingSettings, options: Mapping[str, Any]) -> SamplingSettings:
    """The recipe's settings, changed where `options` (FLAGS, and a list under "set") are not None.

    Raises:
        ValueError: a setting that the recipe's generator does not have, or a value it cannot have.
    """
    given = {name: options[name] for name in FLAGS if options[name] is not None}
    return settings.override(**given, **_parse(options["set"] or [], given))


def _parse(texts: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """NAME=VALUE, the value as YAML has it: null is a value like others."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--set: expected NAME=VALUE, got {text}")
        if name in given or name in found:
            raise ValueError(f"--set: expected {name} to be given once, got it twice")
        found[name] = yaml.safe_load(value)
    return found
