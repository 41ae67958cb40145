"""Sampling settings as command lines give them."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from unimodal_generators.base import SamplingSettings

FLAGS = ("guidance", "image_guidance", "steps", "solver", "shift", "temperature", "top_k", "top_p")
"""Settings that have an option of their own; `--set NAME=VALUE` reaches every other."""


def overridden(settings: SamplingSettings, options: Mapping[str, Any]) -> SamplingSettings:
    """The recipe's settings, changed where `options` (FLAGS, and a list under "set") are not None.

    Raises:
        ValueError: a setting that the recipe's generator does not have, or a value it cannot have.
    """
    return settings.override(**{name: options[name] for name in FLAGS} | _parse(options["set"] or []))


def _parse(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as YAML has it."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--set: expected NAME=VALUE, got {text}")
        found[name] = yaml.safe_load(value)
    return found
