"""Understanding encoders: images as the features of a vision network, for the backbone to read."""

from unimodal.vision.encoder import VisionEncoder

__all__ = ["VisionEncoder"]
