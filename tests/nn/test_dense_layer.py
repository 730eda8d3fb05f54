"""The dense layer: against a loop written from the papers, in any split of the sequence, and its errors."""

import math

import pytest
import torch

from saccade.core.errors import InputError
from saccade.nn import Attention
from saccade.nn.attention import rotary, rotate


def turn(x, place, base):
    """Rotary positions of one vector, from the definition: pair (i, i + D/2) turns by place / base^(2i/D)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = place * base ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def loop(layer, x):
    """Softmax attention one query at a time, each group of query heads with its own key-value head."""
    N, D, share = len(x), layer.head_dim, layer.heads // layer.kv_heads
    q = (x @ layer.q_proj.weight.T).view(N, layer.heads, D)
    k = (x @ layer.k_proj.weight.T).view(N, layer.kv_heads, D)
    v = (x @ layer.v_proj.weight.T).view(N, layer.kv_heads, D)
    out = torch.zeros(N, layer.heads, D, dtype=x.dtype)
    for h in range(layer.heads):
        keys = [turn(k[j, h // share], j, layer.rope_base) for j in range(N)]
        for i in range(N):
            query = turn(q[i, h], i, layer.rope_base)
            scores = torch.stack([query @ keys[j] for j in range(i + 1)]) / D**0.5
            out[i, h] = scores.softmax(0) @ v[: i + 1, h // share]
    return out.reshape(N, -1) @ layer.o_proj.weight.T


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, None), (3, 3, None), (4, 1, 6)])
def test_matches_the_loop(heads, kv_heads, head_dim):
    layer = Attention(24, heads, kv_heads, head_dim, rope_base=100.0).double()
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    with torch.no_grad():
        # angles are float32 whatever the layer's dtype
        torch.testing.assert_close(layer(x).y[0], loop(layer, x[0]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("cuts", [(1,), (16,), (5, 6), (1, 2, 3, 10), (7, 8, 9)])
def test_any_split_gives_the_same(cuts):
    layer = Attention(32, 4, 2).double()
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    whole, state, parts = layer(x), None, []
    for some in x.tensor_split(cuts, dim=1):
        y, state, loss = layer(some, state)
        assert loss is None
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole.y)
    torch.testing.assert_close(state, whole.state)


def test_scores_depend_on_distances_alone():
    x, y = torch.randn(2, 1, 1, 1, 8).double()

    def score(i, j):
        turned = [rotate(t, *(a.double() for a in rotary(p, 1, 8, 100.0, "cpu"))) for t, p in ((x, i), (y, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), atol=1e-4, rtol=0)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_half_precision_tells_far_positions_apart():
    # bfloat16 counts 30000, 30001 and 30002 as one position
    layer = Attention(16, 2).bfloat16()
    x = torch.randn(1, 1, 16, dtype=torch.bfloat16)
    past = torch.zeros(1, 2, 30_000, 8, dtype=torch.bfloat16)
    one = layer(x, (past, past)).state[0][:, :, -1]
    other = layer(x, (past[:, :, 1:], past[:, :, 1:])).state[0][:, :, -1]
    assert one.dtype == torch.bfloat16
    assert not torch.equal(one, other)


def test_impossible_shapes_are_named():
    with pytest.raises(InputError, match="heads=4 is not a multiple of kv_heads=3"):
        Attention(32, 4, 3)
    with pytest.raises(InputError, match="head_dim=5 must be even"):
        Attention(20, 4)
    assert "kv_heads=2" in repr(Attention(32, 4, 2))
