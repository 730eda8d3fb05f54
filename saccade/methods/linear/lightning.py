"""Lightning attention: linear attention that forgets at a fixed rate per head; constant memory at any length."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.errors import InputError
from saccade.kernels.scan import scan
from saccade.methods.base import Layer, Output, check_sizes


class LightningAttention(Layer):
    """Linear attention with a fixed decay per head, a norm after it and an output gate.

    Qin et al. 2024, arXiv 2405.17381 (TransNormerLLM: arXiv 2307.14995; code: OpenNLPLab/lightning-attention).

    q and k go through SiLU; a head sums exp(-slope (t - j)) (q_t·k_j) v_j over j <= t without a denominator, so the sum
    grows with the context and a norm over the merged heads follows. A sigmoid gate weighs the channels. Slopes are
    those of ALiBi, steepest in the first layer and almost 0 in the last: low layers see near, high layers far.

    Args:
        width: channels of the input and output.
        heads: heads.
        layer: index of this layer in the model, from 0.
        layers: number of layers of the model; of a single one the slopes are not scaled.
        head_dim: channels of a head (default: width / heads).

    Shapes:
        x [B, N, C] -> y [B, N, C]; state [B, H, D, D] in float32 or wider, whatever the length

    Departs from the paper: as in the released TransNormerLLM, v has no activation (the example layer of the official
    code puts SiLU on v too); the norm is RMSNorm with a gain; the gate is a full sigmoid projection; no LRPE positions.

    Example:
        >>> layer = LightningAttention(width=32, heads=4, layer=0, layers=2)
        >>> y, state, loss = layer(torch.randn(1, 5, 32))
        >>> y.shape, state.shape, loss
        (torch.Size([1, 5, 32]), torch.Size([1, 4, 8, 8]), None)
    """

    paper = "Qin et al. 2024, arXiv 2405.17381"
    exact = False

    def __init__(self, width: int, heads: int, layer: int = 0, layers: int = 1, head_dim: int | None = None):
        super().__init__()
        check_sizes("LightningAttention", width=width, heads=heads, layers=layers)
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < layers:
            raise InputError(f"LightningAttention: layer must be an int from 0 to {layers - 1}, got {layer!r}")
        head_dim = width // heads if head_dim is None else head_dim
        check_sizes("LightningAttention", head_dim=head_dim)
        self.heads, self.head_dim, self.layer, self.layers = heads, head_dim, layer, layers
        self.slopes = tuple(s * layer_factor(layer, layers) for s in slopes(heads))
        inner = heads * head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.g_proj = nn.Linear(width, inner, bias=False)
        # products of three small numbers: a larger eps would silence an untrained layer
        self.norm = nn.RMSNorm(inner, eps=1e-6)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Output:
        if x.ndim != 3:
            raise InputError(f"LightningAttention: x must be [batch, length, width], got {list(x.shape)}")
        q = self._split(F.silu(self.q_proj(x)))
        k = self._split(F.silu(self.k_proj(x)))
        v = self._split(self.v_proj(x))
        # numbers, not a buffer: casting the model to bfloat16 must not round them
        decay = -torch.tensor(self.slopes, dtype=torch.float64, device="cpu").to(x.device, torch.float32)
        o, state = scan(q, k, v, decay, state)
        o = self.norm(o.transpose(1, 2).flatten(2))
        return Output(self.o_proj(o * torch.sigmoid(self.g_proj(x))), state)

    def _split(self, t: Tensor) -> Tensor:
        return t.unflatten(2, (self.heads, self.head_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, layer={self.layer}, layers={self.layers}"


def slopes(heads: int) -> list[float]:
    """Log-decay per token of each head, as ALiBi's: 2^(-8 (h+1) / heads) for a power of two.

    Otherwise those of the power of two below, then every second one of twice that number.

    Example:
        >>> slopes(4), slopes(3)
        ([0.25, 0.0625, 0.015625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    power = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    return first if power == heads else first + slopes(2 * power)[::2][: heads - power]


def layer_factor(layer: int, layers: int) -> float:
    """What scales the slopes of a layer: 1 for the first, almost 0 for the last, 1 for a single one."""
    return 1.0 - layer / max(layers - 1, 1) + 1e-5
