"""attend_moved: softmax attention to a few key blocks that are put side by side at new positions.

A model that was trained on short contexts cannot make sense of distances it has never seen. Blocks chosen from far away
are rotated to follow one another, so that no distance is longer than what is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Blocks, per_head
from saccade.kernels.attend.tile import NEG_INF, run, softmax
from saccade.kernels.merge import Out

TILE = 1 << 22  # gathered numbers held at a time


def attend_moved(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, call: Call) -> Out:
    """Attention to listed blocks, the j-th of a list standing at positions j * block_k, ...

    Keys and queries come rotated to their own positions, and only the difference is rotated again. A query stands where
    its own token stands in the list. Causality goes by true positions.

    Args:
        q: queries at the end of the keys.
        k, v: keys and values.
        blocks: ascending key blocks of each query block; every row's own block must be among them.
        call: a contiguous, causal call with `rope`.

    Shapes:
        q [B,H,N,D], k [B,G,M,D], v [B,G,M,Dv] -> Out(o [B,H,N,Dv], lse [B,H,N])

    Raises:
        InputError: a call without rope, with holes, or (on a CPU) a row whose own block is not listed.

    Example:
        >>> from saccade.core.rope import Rope
        >>> q = k = torch.randn(1, 1, 8, 4)
        >>> call = Call.of(q, k, rope=Rope(torch.ones(2)))
        >>> everything = Blocks(torch.arange(4).expand(1, 1, 1, 4), 8, 2)
        >>> want = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)
        >>> torch.allclose(attend_moved(q, k, k, everything, call).o, want, atol=1e-6)
        True
    """
    call.check(q, k, v, name="attend_moved")
    blocks.check(call)
    if call.rope is None or not (call.contiguous and call.causal):
        raise InputError("attend_moved: needs a causal call without holes, and call.rope to rotate with")
    B, H, G, N, M = call.shape
    bq, bk, D = blocks.block_q, blocks.block_k, q.shape[3]
    index = per_head(blocks.index, call).long().expand(B, H, -1, -1)
    nq, K = index.shape[2:]
    rows = torch.arange(nq * bq, device=q.device).view(nq, bq)
    position = rows + call.offset
    # which entry of the list holds a row's own token
    own = (index[:, :, :, None, :] == (position // bk)[:, :, None]).int()
    if q.device.type == "cpu" and not bool((own.any(-1) | (rows >= N)).all()):
        raise InputError(f"attend_moved: a row's own block of {bk} slots is not in its list")
    to = own.argmax(-1) * bk + position % bk
    turned = call.rope(_pad(q, nq * bq), (to - position).flatten(2)) * call.softmax_scale(D)
    keys, values = (_pad(t, -(-M // bk) * bk).unflatten(2, (-1, bk)) for t in (k, v))
    step = max(1, TILE // (B * H * K * bk * max(D, bq)))
    inside = torch.arange(bk, device=q.device)
    outs = []
    for a in range(0, nq, step):
        b = min(a + step, nq)
        mine = index[:, :, a:b]
        moved = (torch.arange(K, device=q.device) - mine)[..., None].mul(bk).expand(-1, -1, -1, -1, bk)
        slots = mine[..., None] * bk + inside
        hidden = (mine < 0)[..., None] | (slots >= M)
        hidden = hidden.flatten(3)[:, :, :, None] | (slots.flatten(3)[:, :, :, None] > position[a:b, :, None])

        def tile(
            q: Tensor,
            keys: Tensor,
            values: Tensor,
            mine: Tensor = mine,
            moved: Tensor = moved,
            hidden: Tensor = hidden,
            n: int = b - a,
        ) -> Out:
            at = mine.clamp_min(0).reshape(B, G, -1)[..., None, None].expand(-1, -1, -1, bk, -1)
            near = [
                t.gather(2, at.expand(*at.shape[:4], t.shape[4])).view(B, H, n * K * bk, -1) for t in (keys, values)
            ]
            assert call.rope is not None
            near[0] = call.rope(near[0], moved.flatten(2))
            near = [t.unflatten(2, (n, -1)) for t in near]
            scores = q.unflatten(2, (n, bq)) @ near[0].transpose(-1, -2)
            return softmax(scores.masked_fill(hidden, NEG_INF), near[1], True)

        outs.append(run(tile, turned[:, :, a * bq : b * bq], keys, values))
    o = torch.cat([out.o for out in outs], 2).flatten(2, 3)[:, :, :N]
    lse = torch.cat([out.lse for out in outs if out.lse is not None], 2).flatten(2, 3)[:, :, :N]
    return Out(o, lse)


def _pad(t: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, 0, 0, length - t.shape[2]))
