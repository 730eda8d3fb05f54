"""Dense causal softmax attention with rotary positions and grouped key-value heads: what others are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.errors import InputError
from saccade.methods.base import Layer, Output


class Attention(Layer):
    """Dense causal softmax attention (Vaswani et al. 2017, arXiv 1706.03762) with rotary positions (arXiv 2104.09864).

    Every token attends to itself and to all tokens before it. Groups of `heads / kv_heads` query heads share one
    key-value head (arXiv 2305.13245). The state is the pair (keys, values) of all tokens so far, keys already rotated.

    Args:
        width: channels of the input and output.
        heads: query heads.
        kv_heads: key-value heads (default: as many as query heads).
        head_dim: channels of a head (default: width / heads).
        rope_base: base of the rotary frequencies.

    Shapes:
        x [B, N, C] -> y [B, N, C]; state (k, v), each [B, G, M, D] with M tokens so far

    Example:
        >>> layer = Attention(width=32, heads=4, kv_heads=2)
        >>> y, state, loss = layer(torch.randn(1, 5, 32))
        >>> y.shape, state[0].shape, loss
        (torch.Size([1, 5, 32]), torch.Size([1, 2, 5, 8]), None)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float = 500_000.0,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        head_dim = width // heads if head_dim is None else head_dim
        if heads % kv_heads:
            raise InputError(f"Attention: heads={heads} is not a multiple of kv_heads={kv_heads}")
        if head_dim % 2:
            raise InputError(f"Attention: head_dim={head_dim} must be even for rotary positions")
        self.heads, self.kv_heads, self.head_dim, self.rope_base = heads, kv_heads, head_dim, rope_base
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Output:
        B, N, _ = x.shape
        past = 0 if state is None else state[0].shape[2]
        q = self.q_proj(x).view(B, N, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, N, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, N, self.kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = rotary(past, N, self.head_dim, self.rope_base, x.device)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if state is not None:
            k, v = torch.cat((state[0], k), dim=2), torch.cat((state[1], v), dim=2)
        y = self.attend(q, k, v)
        return Output(self.o_proj(y.transpose(1, 2).reshape(B, N, -1)), (k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the last N of M positions: q [B, H, N, D], k and v [B, G, M, D] -> [B, H, N, D]."""
        N, M = q.shape[2], k.shape[2]
        share = self.heads // self.kv_heads
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
        if N == M:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # the kernels' own causal rule counts from the first key; here the last query sits on the last key
        seen = None if N == 1 else torch.ones(N, M, dtype=torch.bool, device=q.device).tril(M - N)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, rope_base={self.rope_base:g}"


def rotary(start: int, count: int, head_dim: int, base: float, device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions start .. start + count - 1, each float32 [count, head_dim].

    Float32 whatever the model's dtype: bfloat16 cannot tell neighbouring positions apart beyond a few hundred.
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(start, start + count, device=device, dtype=torch.float32)[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) by its angle: x [B, H, N, D], cos and sin [N, D] -> [B, H, N, D]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
