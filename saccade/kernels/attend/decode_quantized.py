"""Decoding from a store of int8: half the bytes, and a long store is read at the speed of its bytes.

Each key has one scale of its own, its largest channel over 127, so a store can grow by a token without touching what it
holds, and any pattern can pick from it. The kernel multiplies after the products: nothing is written out dequantised.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Full, Pattern
from saccade.kernels.attend.decode_units import Tile, cut, form_of
from saccade.kernels.attend.triton_decode import given_by, refuses, run, tile_for
from saccade.kernels.merge import Out

PACKED = 16  # queries of a call at most


class Quantized(NamedTuple):
    """Keys or values as integers.

    Shapes: values int8 [B,G,M,D], scale float32 [B,G,M].
    """

    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """The tensor that they stand for, float32."""
        return self.values.float() * self.scale[..., None]


def quantize(t: Tensor) -> Quantized:
    """Round each key to int8 with a scale of its own; an error is at most half the scale.

    Args:
        t: keys or values.

    Shapes:
        t [B,G,M,D] -> values int8 [B,G,M,D], scale float32 [B,G,M]

    Example:
        >>> quantize(torch.tensor([[[[0.5, -1.27]]]])).values
        tensor([[[[  50, -127]]]], dtype=torch.int8)
    """
    wide = t.float()
    scale = wide.abs().amax(-1) / 127
    return Quantized((wide / scale.clamp_min(1e-30)[..., None]).round().to(torch.int8), scale)


def decode_quantized(
    q: Tensor,
    k: Quantized,
    v: Quantized | Tensor,
    pattern: Pattern | None = None,
    call: Call | None = None,
    *,
    key_bias: Tensor | None = None,
    lse: bool = True,
) -> Out:
    """Attention of a few queries over int8 keys, and int8 values or plain ones.

    Equal to `attend` over `k.dequantize()` and `v.dequantize()`.

    Args:
        q: queries, 1 to 16 of a sequence.
        k: keys, from `quantize`.
        v: values, from `quantize`, or a tensor of q's dtype.
        pattern: where to look; None = Full().
        call: positions, scale, causality; None = causal, the queries are the last N of the M keys.
        key_bias: added to the logits of a key: [1|B, 1|G|H, M].
        lse: also return the log-sum-exp.

    Shapes:
        q [B,H,N,D], k [B,G,M,D], v [B,G,M,Dv] -> Out(o [B,H,N,Dv], lse [B,H,N] or None)

    Raises:
        InputError: shapes that do not fit, or more than 16 queries.
        UnsupportedError: what the decode kernel does not serve, and tensors that are not on a GPU.
    """
    values = v.values if isinstance(v, Quantized) else v
    pattern = Full() if pattern is None else pattern
    call = Call.of(q, k.values) if call is None else call
    # shapes are looked at on stand-ins that have q's dtype and take no memory
    stands = [q.new_empty(()).expand(t.shape) for t in (k.values, values)]
    call.check(q, *stands, name="decode_quantized")
    pattern.check(call)
    for name, one in (("k", k), ("v", v)):
        if isinstance(one, Quantized):
            if one.values.dtype != torch.int8 or one.scale.dtype != torch.float32 or one.scale.stride(-1) != 1:
                raise InputError(
                    f"decode_quantized: {name} is {one.values.dtype} with {one.scale.dtype}; use quantize()"
                )
            if one.scale.shape != one.values.shape[:3]:
                raise InputError(
                    f"decode_quantized: {name} has {list(one.values.shape)}, scales {list(one.scale.shape)}"
                )
        elif one.dtype != q.dtype:
            raise InputError(f"decode_quantized: {name} is {one.dtype}, the queries {q.dtype}; cast one")
    if call.shape.N > PACKED:
        raise InputError(f"decode_quantized: {call.shape.N} queries; it takes up to {PACKED}")
    refused = refuses(q, k.values, values, pattern, call, key_bias)
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        refused = f"the tensors are on {q.device}, the kernel needs a GPU"
    if refused is not None:
        raise UnsupportedError(f"decode_quantized: {refused}")
    launch = cut(form_of(pattern, call), call, q.device, _tile(q, values.shape[3], call))
    given = given_by(q, k.values, values, call)
    given = given._replace(k_scale=k.scale, v_scale=v.scale if isinstance(v, Quantized) else None)
    return run(launch, q, given, key_bias, call, values.shape[3], lse)


def _tile(q: Tensor, Dv: int, call: Call) -> Tile:
    """Integers are half as wide, so twice as many keys make a step."""
    tile = tile_for(q, Dv, call.shape.H // call.shape.G * call.shape.N)
    return tile._replace(keys=2 * tile.keys)
