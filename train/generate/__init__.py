"""Text from a trained model, token by token with a key-value cache."""

from train.generate.decoder import Decoder
from train.generate.sampling import Sampling

__all__ = ["Decoder", "Sampling"]
