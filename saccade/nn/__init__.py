"""Modules that train: a decoder that takes any mixing layer, and the dense layer to compare with."""

from saccade.nn.attention import Attention
from saccade.nn.transformer import MLP, Block, Transformer

__all__ = ["MLP", "Attention", "Block", "Transformer"]
