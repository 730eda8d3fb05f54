"""The specification of attend: dense softmax under the pattern's mask. All others are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Pattern, per_head
from saccade.kernels.merge import Out


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, key_bias: Tensor | None) -> Out:
    """softmax(scale q k^T + key_bias, over the pattern's keys) v; a row without keys gives 0 and lse -inf."""
    H, G, D = q.shape[1], k.shape[1], q.shape[3]
    k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * call.softmax_scale(D)
    if key_bias is not None:
        scores = scores + per_head(key_bias, call)[:, :, None, :].to(wide)
    mask = pattern.mask(call, torch.arange(q.shape[2], device=q.device))
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(lse.isneginf(), 0.0, lse)[..., None])
    return Out((weights @ v.to(wide)).to(q.dtype), lse)
