"""LightningModules, moving average, adversaries, optimizers and what happens around a run."""

from unimodal.training.adversary import Adversary, Discriminator, FeatureDiscriminator, PatchDiscriminator
from unimodal.training.sharding import Sharded
from unimodal.training.tokenizer import TokenizerTraining
from unimodal.training.unified import UnifiedTraining

__all__ = [
    "Adversary",
    "Discriminator",
    "FeatureDiscriminator",
    "PatchDiscriminator",
    "Sharded",
    "TokenizerTraining",
    "UnifiedTraining",
]
