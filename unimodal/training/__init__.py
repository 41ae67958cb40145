"""LightningModules, moving average, optimizers and what happens around a run."""

from unimodal.training.tokenizer import TokenizerTraining
from unimodal.training.unified import UnifiedTraining

__all__ = ["TokenizerTraining", "UnifiedTraining"]
