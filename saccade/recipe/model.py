"""The reader's shape: a decoder of seven million weights, dense attention in every layer."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.nn import Attention, Transformer


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense decoder; the defaults are the bundled reader's.

    Args:
        vocab: number of tokens.
        width: channels.
        layers: number of blocks.
        heads: query heads.
        kv_heads: key-value heads.
        head_dim: channels of a head.
        mlp_width: hidden channels of an MLP.
        rope_base: base of the rotary frequencies.
        length: longest sequence that it is trained for.

    Example:
        >>> sum(p.numel() for p in Shape().build().parameters())
        6951168
    """

    vocab: int = 4096
    width: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp_width: int = 704
    rope_base: float = 500_000.0
    length: int = 32768

    def build(self) -> Transformer:
        """A model of this shape with fresh weights."""
        layers = [
            Attention(self.width, self.heads, self.kv_heads, self.head_dim, self.rope_base) for _ in range(self.layers)
        ]
        return Transformer(self.vocab, self.width, layers, self.mlp_width)
