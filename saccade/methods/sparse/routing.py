"""Routing attention: tokens attend within clusters that an online k-means finds, beside heads that look nearby."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Groups, Window
from saccade.kernels.attend import attend
from saccade.kernels.groups import attend_groups
from saccade.methods.base import Layer, Output, check_sizes


class RoutingState(NamedTuple):
    """All that was routed, and the end of what is nearby: tokens so far, q and v of all of them, last local k and v."""

    seen: int
    q: Tensor
    v: Tensor
    near_k: Tensor
    near_v: Tensor


class RoutingAttention(Layer):
    """Sparse attention inside clusters of similar tokens, found by online k-means (routing heads), and local heads.

    Roy, Saffar, Vaswani, Grangier 2020, arXiv 2003.05997 (code: google-research/google-research, routing_transformer).

    A routing head has one projection for queries and keys, normalised to norm sqrt(D). Each of its `clusters` centroids
    takes the `window` tokens nearest to it, so clusters are balanced and a token is in none, one or several; tokens
    attend causally within a cluster, and a token's output is the mean over its clusters, 0 in none. Local heads attend
    to the `recent` last tokens with rotary positions. In training the centroids follow the mean of the tokens nearest
    to them, when the gradient of the returned loss is taken: add the loss to yours, or they stand still.

    Choosing members compares tokens with later ones, so `forward` over a whole sequence is not strictly causal: a later
    token may push an earlier one out of a cluster. With `state`, membership is chosen anew over all tokens so far, and
    the new rows are those of one call over everything so far. Fed token by token the layer is strictly causal, and
    earlier outputs are not revised; a sequence in pieces therefore differs from one call, which saw the later tokens.

    Args:
        width: channels of the input and output.
        heads: heads, local and routing.
        clusters: centroids of a routing head, about sqrt(N).
        window: tokens in a cluster; clusters * window >= N covers every token.
        recent: tokens that a local head sees, itself included.
        local_heads: how many of the heads are local (default: half).
        head_dim: channels of a head (default: width / heads).
        commitment: weight of the loss that pulls tokens to their centroid.
        ema: share of a centroid that stays in an update; 1.0 keeps the initial, random centroids.
        scale: factor on q·k of routing heads (default: 1/sqrt(D), which leaves logits in ±sqrt(D)).
        rope_base: base of the rotary frequencies of local heads.

    Shapes:
        x [B, N, C] -> y [B, N, C]; state RoutingState; loss 0-d in training, else None

    Departs from the paper: centroids follow the mean direction (norm sqrt(D)) in one buffer, not count and sum in two;
    the commitment loss counts the shared queries once; routing heads have no positions; counts are not padded by an
    epsilon; local heads slide instead of looking at blocks. Under data parallelism each process updates its own copy.

    Example:
        >>> layer = RoutingAttention(width=32, heads=4, clusters=2, window=4, recent=3)
        >>> y, state, loss = layer(torch.randn(1, 8, 32))
        >>> y.shape, state.q.shape, loss.shape
        (torch.Size([1, 8, 32]), torch.Size([1, 2, 8, 8]), torch.Size([]))
    """

    paper = "Roy et al. 2020, arXiv 2003.05997"
    strictly_causal = False
    chunked = "members of a cluster are chosen among the tokens so far; earlier rows are not revised"
    centroids: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        clusters: int = 8,
        window: int = 64,
        recent: int = 64,
        local_heads: int | None = None,
        head_dim: int | None = None,
        commitment: float = 1e-4,
        ema: float = 0.999,
        scale: float | None = None,
        rope_base: float = 10_000.0,
    ):
        super().__init__()
        sizes = dict(width=width, heads=heads, clusters=clusters, window=window, recent=recent)
        check_sizes("RoutingAttention", **sizes)
        local_heads = heads // 2 if local_heads is None else local_heads
        head_dim = width // heads if head_dim is None else head_dim
        check_sizes("RoutingAttention", head_dim=head_dim)
        if isinstance(local_heads, bool) or not isinstance(local_heads, int) or not 0 <= local_heads < heads:
            raise InputError(
                f"RoutingAttention: local_heads={local_heads!r} of {heads} heads; leave one or more to route"
            )
        if not 0.0 <= ema <= 1.0:
            raise InputError(f"RoutingAttention: ema must be in [0, 1], got {ema}")
        if head_dim % 2:
            raise InputError(f"RoutingAttention: head_dim={head_dim} must be even for rotary positions")
        self.heads, self.local_heads, self.head_dim = heads, local_heads, head_dim
        self.clusters, self.window, self.recent = clusters, window, recent
        self.commitment, self.ema, self.scale, self.rope_base = commitment, ema, scale, rope_base
        self.route_proj = nn.Linear(width, (heads - local_heads) * head_dim, bias=False)
        self.q_proj = nn.Linear(width, local_heads * head_dim, bias=False) if local_heads else None
        self.k_proj = nn.Linear(width, local_heads * head_dim, bias=False) if local_heads else None
        self.v_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.register_buffer("centroids", normalise(torch.randn(heads - local_heads, clusters, head_dim)))

    def forward(self, x: Tensor, state: RoutingState | None = None) -> Output:
        if x.ndim != 3:
            raise InputError(f"RoutingAttention: x must be [batch, length, width], got {list(x.shape)}")
        v_near, v = self._split(self.v_proj(x)).split((self.local_heads, self.heads - self.local_heads), 1)
        q = normalise(self._split(self.route_proj(x)))
        seen = 0 if state is None else state.seen
        loss = self._loss(q) if self.training else None
        outs, near = [], (v_near, v_near)
        if self.q_proj is not None and self.k_proj is not None:
            q_near = rotate(self._split(self.q_proj(x)), seen, self.rope_base)
            k_near = rotate(self._split(self.k_proj(x)), seen, self.rope_base)
            near = (k_near, v_near) if state is None else _append(state[3:], (k_near, v_near))
            outs.append(attend(q_near, *near, Window(0, self.recent), lse=False).o)
        full = (q, v) if state is None else _append(state[1:3], (q, v))
        outs.append(self._route(q, *full))
        # the window of the next token needs recent - 1 keys and no more
        start = max(0, near[0].shape[2] - self.recent + 1)
        state = RoutingState(seen + x.shape[1], *full, *(t[:, :, start:] for t in near))
        return Output(self.o_proj(torch.cat(outs, 1).transpose(1, 2).flatten(2)), state, loss)

    def members(self, q: Tensor) -> Tensor:
        """Tokens of each cluster, q [B,Hr,M,D] -> ascending [B,Hr,clusters,min(window,M)]; another choice goes here."""
        near = self._affinity(q).transpose(-1, -2)
        return near.topk(min(self.window, q.shape[2]), -1).indices.sort(-1).values

    def _route(self, q: Tensor, keys: Tensor, v: Tensor) -> Tensor:
        """Attention of the last tokens, q [B,Hr,N,D], within clusters of all, keys and v [B,Hr,M,D]."""
        N, M = q.shape[2], keys.shape[2]
        index = self.members(keys)
        # members ascend, so those of the last N tokens are among the last N of a cluster; of the others no row is asked
        rows = index[..., -N:] - (M - N)
        groups = Groups(rows.masked_fill(rows < 0, -1), index)
        return attend_groups(q, keys, v, groups, Call.of(q, keys, scale=self.scale))[0]

    def _loss(self, q: Tensor) -> Tensor:
        """Mean squared distance to the nearest centroid; taking its gradient moves the centroids."""
        nearest = self._affinity(q).argmax(-1)
        head = torch.arange(q.shape[1], device=q.device)[:, None]
        loss = self.commitment * (q - self.centroids[head, nearest].to(q.dtype)).square().mean()
        if loss.requires_grad:
            # backward runs once where checkpointing runs forward twice, and both runs must see the same centroids
            loss.register_hook(self._update(q.detach().float(), nearest))
        return loss

    @torch.no_grad()
    def _update(self, q: Tensor, nearest: Tensor) -> Callable[[Tensor], None]:
        """What moves each centroid towards the mean direction of its tokens; one without tokens stays."""
        chosen = F.one_hot(nearest, self.clusters)
        with torch.autocast(q.device.type, enabled=False):
            target = normalise(torch.einsum("bhnc,bhnd->hcd", chosen.float(), q))
        step = (1.0 - self.ema) * chosen.sum((0, 2)).gt(0)[..., None]

        def update(_: Tensor) -> None:
            with torch.no_grad():
                self.centroids += step * (target - self.centroids)

        return update

    @torch.no_grad()
    def _affinity(self, q: Tensor) -> Tensor:
        """q [B,Hr,M,D] times the centroids -> [B,Hr,M,clusters]; between equal norms larger is nearer."""
        with torch.autocast(q.device.type, enabled=False):
            return q.float() @ self.centroids.transpose(-1, -2)

    def _split(self, t: Tensor) -> Tensor:
        return t.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoutingAttention:
        """Centroids move with the module but stay float32: steps of 0.001 vanish in bfloat16."""
        kept = self.centroids
        super()._apply(fn, recurse)
        if not kept.is_meta:
            self.centroids = kept.to(self.centroids.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, local_heads={self.local_heads}, head_dim={self.head_dim}, "
            f"clusters={self.clusters}, window={self.window}, recent={self.recent}"
        )


def normalise(t: Tensor) -> Tensor:
    """LayerNorm without weights over the last axis: mean 0, norm sqrt(D)."""
    return F.layer_norm(t, t.shape[-1:])


def rotate(t: Tensor, start: int, base: float) -> Tensor:
    """Rotary positions start, start + 1, ... for t [B,H,N,D]: pairs (t_i, t_{i + D/2}) turn by their angles."""
    half = t.shape[3] // 2
    frequency = base ** (-torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angle = torch.arange(start, start + t.shape[2], device=t.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = t.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(t.dtype)


def _append(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True))
