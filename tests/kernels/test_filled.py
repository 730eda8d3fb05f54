"""Attention to a store whose size stands still: the decode kernel reads what is stored, nothing behind it."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton, which has no wheel for this platform")

from saccade.core.call import Call, Filled
from saccade.core.pattern import Blocks, Full, PerHead, Tokens, Union, Window
from saccade.kernels.attend import attend, triton_decode

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
B, H, G, M, L, D = 2, 4, 2, 210, 170, 16


def patterns():
    rng = torch.Generator().manual_seed(3)
    blocks = torch.rand(B, H, 1, 27, generator=rng).argsort(-1)[..., :9].sort(-1).values.int().to(DEVICE)
    tokens = torch.rand(B, G, 1, M, generator=rng).argsort(-1)[..., :30].int().to(DEVICE)
    return {
        "everything": Full(),
        "a window": Window(5, 40),
        "a window of everything": Window(0, 500),
        "blocks": Blocks(blocks, 1, 8),
        "tokens": Tokens(tokens),
        "a window and blocks": Union((Window(3, 20), Blocks(blocks, 1, 8))),
        "heads apart": PerHead((((0, 1), Full()), ((2, 3), Window(4, 25)))),
    }


@pytest.mark.parametrize("name", patterns())
def test_equals_attention_to_what_is_stored(name):
    pattern = patterns()[name]
    q, k, v = (torch.randn(B, heads, n, D, device=DEVICE) for heads, n in ((H, 1), (G, M), (G, M)))
    # whoever reads what is still to come gets NaN
    k[:, :, L:], v[:, :, L:] = float("nan"), float("nan")
    length = torch.tensor([L], device=DEVICE)
    where = dict(q_pos=(length - 1)[None], k_pos=torch.arange(M, dtype=torch.int32, device=DEVICE)[None, None])
    call = Call.of(q, k, filled=Filled(length, 150, L - 1), **where)
    got = attend(q, k, v, pattern, call, impl="triton")
    k, v = k.nan_to_num(), v.nan_to_num()
    want = attend(q.double(), k.double(), v.double(), pattern, Call.of(q, k, **where), impl="reference")
    torch.testing.assert_close(got.o.double(), want.o, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse.double(), want.lse, atol=1e-5, rtol=1e-5)


def test_a_window_is_not_looked_for_in_the_whole_store():
    # positions alone say nothing of where they lie: then all slots are looked through
    k = torch.zeros(1, 1, 4096, D, device=DEVICE)
    q, length = k[:, :, :1], torch.tensor([4000], device=DEVICE)
    where = dict(q_pos=(length - 1)[None], k_pos=torch.arange(4096, device=DEVICE)[None, None])
    tile = triton_decode.tile_for(q, D, 1)
    splits = []
    for filled in (None, Filled(length, 4000, 3999)):
        call = Call.of(q, k, filled=filled, **where)
        form = triton_decode.form_of(Window(4, 100), call)
        splits.append(triton_decode.cut(form, call, torch.device("cpu"), tile._replace(programs=64)).splits)
    assert splits[1] <= -(-105 // tile.keys) < splits[0]
