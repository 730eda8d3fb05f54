"""Bounds of pages for one query over a store whose size stands still, on a GPU: one launch scores all pages of a layer.

It also writes the bounds of the newest token's page, which no other program of the launch needs: a query's own page is
not scored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.here import here

PAGES = 16  # that a program scores


@here
def page_scores(
    q: Tensor, k: Tensor, rows: Tensor, block: int, length: Tensor, pages: int, spare: int, now: Tensor, own: float
) -> Tensor:
    """The most that the query's products can be in each page, float32 [B,H,1,pages + spare].

    Args:
        q: one query [B,H,1,D].
        k: keys with all their room [B,G,M,D], channels side by side.
        rows: bounds of pages [B,G,>= pages,2D], smallest and then largest, float32; the newest page's are written.
        block: keys in a page.
        length: keys stored, int64 [1] on the device.
        pages: of all the room. Those behind the newest token's get -inf, its own `own`.
        spare: columns behind the pages, +inf in the first `now` (int64 [1] on the device) and -inf in the others.
        own: score of the query's own page.
    """
    B, H, _, D = q.shape
    G, total = k.shape[1], pages + spare
    scores = torch.empty((B, H, 1, total), dtype=torch.float32, device=q.device)
    q = q.contiguous()
    _page_scores[(triton.cdiv(total, PAGES), B * G)](
        q, k, rows, scores, length, now, *k.stride()[:3], *rows.stride()[:3], G, pages, total, own,
        SHARE=H // G, D=D, WIDTH=triton.next_power_of_2(max(16, D)), KEYS=block,
        ROOM=triton.next_power_of_2(max(2, block)), MANY=PAGES, num_warps=4,
    )  # fmt: skip
    return scores


@triton.jit(do_not_specialize=["pages", "total"])
def _page_scores(
    q, k, rows, scores, length, now, kb, kg, kn, rb, rg, rn, G, pages, total, own_score,
    SHARE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, ROOM: tl.constexpr,
    MANY: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(1).to(tl.int64)
    b, g = line // G, line % G
    stored = tl.load(length)
    own = (stored - 1) // KEYS
    page = tl.program_id(0) * MANY + tl.arange(0, MANY)
    d = tl.arange(0, WIDTH)
    wide = d < D
    k += b * kb + g * kg
    rows += b * rb + g * rg
    first = tl.program_id(0) * MANY
    if (own >= first) & (own < first + MANY):
        slot = own * KEYS + tl.arange(0, ROOM)
        real = (tl.arange(0, ROOM) < KEYS) & (slot < stored)
        keys = tl.load(k + slot[:, None] * kn + d[None], mask=real[:, None] & wide[None], other=0.0).to(tl.float32)
        low = tl.min(tl.where(real[:, None], keys, float("inf")), 0)
        high = tl.max(tl.where(real[:, None], keys, float("-inf")), 0)
        tl.store(rows + own * rn + d, low, mask=wide)
        tl.store(rows + own * rn + D + d, high, mask=wide)
    old = page < own
    at = rows + page.to(tl.int64)[:, None] * rn + d[None]
    low = tl.load(at, mask=old[:, None] & wide[None], other=0.0)
    high = tl.load(at + D, mask=old[:, None] & wide[None], other=0.0)
    blank = tl.where(page - pages < tl.load(now), float("inf"), float("-inf"))
    for i in tl.static_range(SHARE):
        head = line * SHARE + i
        row = tl.load(q + head * D + d, mask=wide, other=0.0).to(tl.float32)[None]
        score = tl.sum(tl.maximum(row, 0.0) * high + tl.minimum(row, 0.0) * low, 1)
        score = tl.where(old, score, tl.where(page == own, own_score, float("-inf")))
        score = tl.where(page < pages, score, blank)
        tl.store(scores + head * total + page, score, mask=page < total)
