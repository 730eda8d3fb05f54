"""Lightning attention: parallel = recurrent, slopes of the paper, bounded output."""

import math

import pytest
import torch
from torch.nn import functional as F

from saccade.core.errors import InputError
from saccade.methods.linear.lightning import LightningAttention, layer_factor, slopes


def make(heads=2, layer=0, layers=2, width=8, head_dim=None, seed=0):
    torch.manual_seed(seed)
    return LightningAttention(width, heads, layer, layers, head_dim).double()


def loop(layer, x):
    """Pair by pair, from the card: o_t = sum over j <= t of exp(-s (t - j)) (q_t . k_j) v_j, norm, gate, projection."""
    H, D = layer.heads, layer.head_dim
    out = []
    for row in x:
        q, k, v = (row @ m.weight.T for m in (layer.q_proj, layer.k_proj, layer.v_proj))
        q, k = F.silu(q), F.silu(k)
        o = torch.zeros_like(v)
        for h in range(H):
            part = slice(h * D, (h + 1) * D)
            s = 2.0 ** (-8 * (h + 1) / H) * (1 - layer.layer / (layer.layers - 1) + 1e-5)
            for t in range(len(row)):
                for j in range(t + 1):
                    o[t, part] += math.exp(-s * (t - j)) * (q[t, part] @ k[j, part]) * v[j, part]
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight
        out.append((o * torch.sigmoid(row @ layer.g_proj.weight.T)) @ layer.o_proj.weight.T)
    return torch.stack(out)


@pytest.mark.parametrize("layer", [0, 1])
def test_equals_the_loop_over_pairs(layer):
    mixer = make(layer=layer)
    with torch.no_grad():
        mixer.norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    # the layer rounds its slopes to float32
    torch.testing.assert_close(mixer(x).y, loop(mixer, x), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("N", [1, 63, 64, 65, 130])
def test_token_by_token_equals_one_call(N):
    mixer = make(heads=3, head_dim=4)
    x = torch.randn(2, N, 8, dtype=torch.float64)
    whole, state, outs = mixer(x), None, []
    for t in range(N):
        y, state, loss = mixer(x[:, t : t + 1], state)
        outs.append(y)
        assert loss is None and state.shape == (2, 3, 4, 4)
    torch.testing.assert_close(torch.cat(outs, 1), whole.y)
    torch.testing.assert_close(state, whole.state)


@pytest.mark.parametrize("cut", [1, 40, 64, 99])
def test_a_sequence_may_be_cut_anywhere(cut):
    mixer, x = make(), torch.randn(2, 100, 8, dtype=torch.float64)
    first = mixer(x[:, :cut])
    second = mixer(x[:, cut:], first.state)
    torch.testing.assert_close(torch.cat((first.y, second.y), 1), mixer(x).y)


def test_later_tokens_change_no_bit():
    mixer, x = make().float(), torch.randn(2, 100, 8)
    other = x.clone()
    other[:, 50:] += 1.0
    a, b = mixer(x).y, mixer(other).y
    assert torch.equal(a[:, :50], b[:, :50]) and not torch.equal(a[:, 50:], b[:, 50:])


def test_slopes_of_the_paper():
    assert slopes(8) == [2.0**-n for n in range(1, 9)]
    # six heads: those of four, then the first two of every second one of eight
    assert slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert slopes(1) == [2.0**-8]
    assert layer_factor(0, 4) == 1 + 1e-5 and layer_factor(3, 4) == pytest.approx(1e-5)
    assert layer_factor(0, 1) == 1 + 1e-5
    assert make(heads=8, layer=1, layers=3).slopes == pytest.approx([2.0**-n * 0.50001 for n in range(1, 9)])


def test_the_norm_bounds_the_output():
    mixer = make(layer=1).float()
    x = torch.randn(1, 1, 8).expand(1, 3000, 8)
    size = mixer(x).y.norm(dim=-1)[0]
    # the state grows by one equal summand per token, the output does not
    assert mixer(x).state.abs().max() > 100 * mixer(x[:, :1]).state.abs().max()
    assert size[-1] < 1.1 * size[10]


def test_scaling_values_changes_nothing():
    mixer, x = make(), torch.randn(2, 20, 8, dtype=torch.float64)
    want = mixer(x).y
    with torch.no_grad():
        mixer.v_proj.weight *= 1000
        large = mixer(x).y
        mixer.v_proj.weight *= 1000
    torch.testing.assert_close(mixer(x).y, large, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(large, want, atol=1e-2, rtol=1e-1)


def test_gradients():
    mixer = make(width=4)
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mixer(x).y, (x,), atol=1e-5)
    mixer(x).y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixer.parameters())


def test_bfloat16_keeps_slopes_and_state_wide():
    mixer = make(layer=1, layers=3).bfloat16()
    out = mixer(torch.randn(1, 70, 8, dtype=torch.bfloat16))
    assert out.y.dtype == torch.bfloat16 and out.state.dtype == torch.float32
    assert mixer.slopes == make(layer=1, layers=3).slopes
    assert not list(mixer.buffers())


def test_repr_and_errors():
    assert "heads=2, head_dim=4, layer=0, layers=2" in repr(make())
    with pytest.raises(InputError, match="layer"):
        LightningAttention(8, 2, layer=2, layers=2)
    with pytest.raises(InputError, match=r"\[5, 8\]"):
        make()(torch.zeros(5, 8, dtype=torch.float64))
