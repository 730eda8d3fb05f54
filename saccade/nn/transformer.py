"""A small decoder whose mixing layers may be of any kind: dense, linear, routed, or a mixture of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.errors import InputError
from saccade.methods.base import Layer, Output


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x)).

    Args:
        width: channels in and out.
        hidden: channels between.

    Shapes:
        x [B, N, C] -> [B, N, C]
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + layer(norm(x)), then x + mlp(norm(x)).

    Args:
        width: channels.
        layer: what mixes the tokens.
        mlp_width: hidden channels of the MLP.

    Shapes:
        x [B, N, C] -> Output(y [B, N, C], the layer's state, the layer's loss)
    """

    def __init__(self, width: int, layer: Layer, mlp_width: int):
        super().__init__()
        self.layer_norm = nn.RMSNorm(width, eps=1e-5)
        self.layer = layer
        self.mlp_norm = nn.RMSNorm(width, eps=1e-5)
        self.mlp = MLP(width, mlp_width)

    def forward(self, x: Tensor, state: Any = None) -> Output:
        mixed = self.layer(self.layer_norm(x), state)
        x = x + mixed.y
        return Output(x + self.mlp(self.mlp_norm(x)), mixed.state, mixed.loss)


class Transformer(nn.Module):
    """A pre-norm decoder: embedding, blocks of [layer, SwiGLU], final norm, head.

    Weights start at std 0.02. A weight named `o_proj` or `down_proj` writes to the residual stream and starts smaller,
    by 1 / sqrt(2 * layers): a layer of your own takes part in that rule by naming its last projection `o_proj`.
    Vectors, buffers and matrices that are no `nn.Linear` keep the values that their layer gave them.

    Args:
        vocab: number of tokens.
        width: channels.
        layers: one mixing layer per block; they may differ.
        mlp_width: hidden channels of each MLP.
        tie: whether the head is the embedding (True).

    Shapes:
        ids [B, N] -> Output(y = logits [B, N, vocab], state = list of one per layer, loss = sum over layers or None)

    Example:
        >>> from saccade.nn.attention import Attention
        >>> model = Transformer(50, 32, [Attention(32, heads=2) for _ in range(2)], mlp_width=64)
        >>> logits, state, loss = model(torch.tensor([[1, 2, 3]]))
        >>> logits.shape, len(state), loss
        (torch.Size([1, 3, 50]), 2, None)
        >>> model(torch.tensor([[4]]), state).y.shape
        torch.Size([1, 1, 50])
    """

    def __init__(self, vocab: int, width: int, layers: Sequence[Layer], mlp_width: int, tie: bool = True):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, layer, mlp_width) for layer in layers)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocab, bias=False)
        if tie:
            self.head.weight = self.embed.weight
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw the weights of all linear maps and of the embedding again."""
        nn.init.normal_(self.embed.weight, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and module.weight is not self.embed.weight:
                writes = name.rsplit(".", 1)[-1] in ("o_proj", "down_proj")
                nn.init.normal_(module.weight, std=0.02 / (2 * len(self.blocks)) ** 0.5 if writes else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def hidden(self, ids: Tensor, state: Sequence[Any] | None = None) -> Output:
        """As `forward`, but y are the normed hidden states [B, N, C]: `model.head(y)` gives the logits.

        For losses that need few of the logits, and for prefill, which needs the last row only.
        """
        state = [None] * len(self.blocks) if state is None else state
        if len(state) != len(self.blocks):
            raise InputError(f"Transformer: {len(state)} states for {len(self.blocks)} blocks")
        x, states, losses = self.embed(ids), [], []
        for block, past in zip(self.blocks, state, strict=True):
            out = block(x, past)
            x = out.y
            states.append(out.state)
            if out.loss is not None:
                losses.append(out.loss)
        return Output(self.norm(x), states, sum(losses) if losses else None)

    def forward(self, ids: Tensor, state: Sequence[Any] | None = None) -> Output:
        out = self.hidden(ids, state)
        return out._replace(y=self.head(out.y))
