"""Routing attention: against a loop written from its card, clusters by hand, centroids that move only in training."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from saccade.core.errors import InputError
from saccade.methods.sparse.routing import RoutingAttention, normalise, rotate


def make(width=12, heads=4, clusters=3, window=4, recent=3, seed=0, **more):
    torch.manual_seed(seed)
    layer = RoutingAttention(width, heads, clusters, window, recent, head_dim=6, **more)
    return layer.double()


def inputs(N, B=2, width=12, seed=1):
    return torch.randn(B, N, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(t):
    """Mean 0 and variance 1, as LayerNorm without weights."""
    t = t - t.mean()
    return t / (t.square().mean() + 1e-5).sqrt()


def turned(t, position, base=10_000.0):
    """One vector after a rotation of each pair (i, i + D/2) by position * base^(-2i/D)."""
    D = len(t)
    out = t.clone()
    for i in range(D // 2):
        a = position * base ** (-2 * i / D)
        out[i] = t[i] * math.cos(a) - t[i + D // 2] * math.sin(a)
        out[i + D // 2] = t[i] * math.sin(a) + t[i + D // 2] * math.cos(a)
    return out


@torch.no_grad()
def loop(layer, x):
    """Token by token from the card: local heads, balanced clusters, causal softmax inside, mean over clusters."""
    D, local, rows = layer.head_dim, layer.local_heads, []
    for tokens in x:
        N = len(tokens)
        heads = []
        for h in range(layer.heads):
            v = tokens @ layer.v_proj.weight[h * D : (h + 1) * D].T
            o = torch.zeros_like(v)
            if h < local:
                part = slice(h * D, (h + 1) * D)
                q, k = (tokens @ m.weight[part].T for m in (layer.q_proj, layer.k_proj))
                for i in range(N):
                    at = range(max(0, i - layer.recent + 1), i + 1)
                    logits = torch.stack([turned(q[i], i) @ turned(k[j], j) / math.sqrt(D) for j in at])
                    o[i] = torch.softmax(logits, 0) @ v[at.start : at.stop]
            else:
                r = h - local
                q = torch.stack([normal(t) for t in tokens @ layer.route_proj.weight[r * D : (r + 1) * D].T])
                count = [0] * N
                for mu in layer.centroids[r]:
                    best = sorted(range(N), key=lambda n: -float(q[n].float() @ mu))[: layer.window]
                    for i in best:
                        at = [j for j in best if j <= i]
                        logits = torch.stack([q[i] @ q[j] / math.sqrt(D) for j in at])
                        o[i] += torch.softmax(logits, 0) @ v[at]
                        count[i] += 1
                o = o / torch.tensor([max(c, 1) for c in count])[:, None]
            heads.append(o)
        rows.append(torch.cat(heads, 1) @ layer.o_proj.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize("local_heads", [0, 2, 3])
@pytest.mark.parametrize("N", [1, 3, 11, 16])
def test_equals_the_loop(N, local_heads):
    layer, x = make(local_heads=local_heads).eval(), inputs(N)
    # angles are float32
    torch.testing.assert_close(layer(x).y, loop(layer, x), atol=1e-6, rtol=1e-5)


def test_members_are_distinct_ascending_and_nearest():
    layer = make(clusters=5, window=7)
    q = normalise(torch.randn(2, 2, 40, 6, dtype=torch.float64))
    index = layer.members(q)
    assert index.shape == (2, 2, 5, 7)
    assert (index.diff(dim=-1) > 0).all()
    near = torch.einsum("bhnd,hcd->bhcn", q.float(), layer.centroids)
    chosen = near.gather(3, index).min(-1).values
    assert (near.scatter(3, index, -torch.inf).max(-1).values <= chosen).all()


def test_two_clusters_by_hand():
    layer = make(heads=1, local_heads=0, clusters=2, window=2, width=6).eval()
    e1 = normalise(torch.tensor([3.0, -1, -1, 1, -1, -1], dtype=torch.float64))
    layer.centroids.copy_(torch.stack((e1, -e1))[None])
    # the fourth and the second token belong together, as do the first and the third: +, -, +, -
    q = torch.stack((e1, -e1, e1, -e1))[None, None]
    assert layer.members(q)[0, 0].tolist() == [[0, 2], [1, 3]]
    v = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)[None, None, :, None].expand(1, 1, 4, 6)
    # equal vectors weigh equally: the first of a cluster sees itself, the second the mean of both
    got = layer._route(q, q, v)[0, 0, :, 0]
    torch.testing.assert_close(got, torch.tensor([1.0, 2.0, 2.5, 5.0], dtype=torch.float64))


@pytest.mark.parametrize("N", [1, 63, 64, 65])
def test_one_cluster_of_all_is_dense_attention(N):
    layer, x = make(heads=2, local_heads=0, clusters=1, window=N).eval(), inputs(N)
    q, v = ((x @ m.weight.T).view(2, N, 2, 6).transpose(1, 2) for m in (layer.route_proj, layer.v_proj))
    q = normalise(q)
    o = torch.nn.functional.scaled_dot_product_attention(q, q, v, is_causal=True)
    torch.testing.assert_close(layer(x).y, layer.o_proj(o.transpose(1, 2).flatten(2)))


def test_tokens_in_no_cluster_give_zero():
    layer, x = make(heads=2, local_heads=0, clusters=1, window=3).eval(), inputs(20)
    y, inside = layer(x).y, set()
    for b in range(2):
        q = normalise((x[b] @ layer.route_proj.weight.T).view(1, 20, 2, 6).transpose(1, 2))
        inside |= {(b, n) for n in layer.members(q).flatten().tolist()}
    outside = torch.tensor([[(b, n) not in inside for n in range(20)] for b in range(2)])
    assert outside.any() and (y[outside] == 0).all() and (y[~outside] != 0).all()


def test_members_depend_on_later_tokens_but_values_do_not(monkeypatch):
    layer, x = make().eval(), inputs(16)
    other = x.clone()
    other[:, 10:] = inputs(16, seed=5)[:, 10:]
    assert not torch.allclose(layer(x).y[:, :10], layer(other).y[:, :10])
    fixed = torch.stack([torch.randperm(16)[:4].sort().values for _ in range(12)]).view(2, 2, 3, 4)
    monkeypatch.setattr(layer, "members", lambda q: fixed)
    torch.testing.assert_close(layer(x).y[:, :10], layer(other).y[:, :10], atol=0, rtol=0)
    assert not layer.strictly_causal


@pytest.mark.parametrize("cut", [1, 2, 7, 14])
@pytest.mark.parametrize("window", [4, 40])
def test_going_on_gives_the_rows_of_a_call_over_everything(cut, window):
    layer, x = make(window=window).eval(), inputs(15)
    first = layer(x[:, :cut])
    second = layer(x[:, cut:], first.state)
    torch.testing.assert_close(second.y, layer(x).y[:, cut:])
    assert second.state.seen == 15 and second.state.q.shape == (2, 2, 15, 6)
    assert second.state.near_k.shape == (2, 2, 2, 6)


def test_token_by_token_each_row_is_the_last_of_its_prefix():
    layer, x = make(recent=1).eval(), inputs(12)
    state = None
    for t in range(12):
        y, state, _ = layer(x[:, t : t + 1], state)
        torch.testing.assert_close(y[:, 0], layer(x[:, : t + 1]).y[:, -1])


def test_evaluation_and_no_grad_leave_the_centroids():
    layer, x = make(), inputs(16)
    before = layer.centroids.clone()
    with torch.no_grad():
        assert not layer.train()(x).loss.requires_grad
    out = layer.eval()(x)
    out.y.sum().backward()
    assert out.loss is None and torch.equal(layer.centroids, before)
    # in training they wait for the gradient of the loss
    layer.train()(x)
    assert torch.equal(layer.centroids, before) and layer.centroids.dtype == torch.float32


def test_training_moves_centroids_to_the_mean_of_their_tokens():
    layer, x = make(ema=0.9, clusters=4), inputs(16)
    before = layer.centroids.clone()
    layer.centroids[0, 3] = before[0, 3] = -100 * before[0, 3]
    q = normalise((x @ layer.route_proj.weight.T).view(2, 16, 2, 6).transpose(1, 2)).float()
    nearest = torch.einsum("bhnd,hcd->bhnc", q, before).argmax(-1)
    layer(x).loss.backward()
    for h in range(2):
        for c in range(4):
            mine = q[:, h][nearest[:, h] == c]
            want = before[h, c]
            if len(mine):
                want = 0.9 * before[h, c] + 0.1 * math.sqrt(6) * mine.sum(0) / mine.sum(0).norm()
            torch.testing.assert_close(layer.centroids[h, c], want, atol=1e-4, rtol=1e-4)
    assert not torch.equal(layer.centroids, before)
    assert layer.centroids.grad is None and "centroids" in layer.state_dict()


def test_a_centroid_without_tokens_and_one_that_is_fixed_stay():
    layer, x = make(clusters=2), inputs(16)
    # all tokens lie on the side of the first centroid of head 0
    x[:] = x[:1, :1]
    q = normalise((x[0, 0] @ layer.route_proj.weight.T).view(2, 6)).detach()
    layer.centroids[0, 0], layer.centroids[0, 1] = 0.5 * q[0], -q[0]
    before = layer.centroids.clone()
    layer(x).loss.backward()
    assert torch.equal(layer.centroids[0, 1], before[0, 1]) and not torch.equal(layer.centroids[0, 0], before[0, 0])
    layer.ema, before = 1.0, layer.centroids.clone()
    layer(x).loss.backward()
    assert torch.equal(layer.centroids, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_moves_centroids_once(reentrant):
    x = inputs(16).requires_grad_()
    plain, saved = make(), make()

    def total(out):
        return out.y.square().sum() + out.loss

    total(plain(x)).backward()
    grads = [p.grad for p in plain.parameters()]
    checkpoint(lambda x: total(saved(x)), x, use_reentrant=reentrant).backward()
    assert torch.equal(plain.centroids, saved.centroids)
    for p, grad in zip(saved.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_commitment_pulls_tokens_to_their_centroid():
    layer = make(commitment=0.5)
    q = normalise(torch.randn(2, 2, 9, 6, dtype=torch.float64)).requires_grad_()
    nearest = layer._affinity(q).argmax(-1)
    mu = layer.centroids[torch.arange(2)[:, None], nearest].double()
    loss = layer._loss(q)
    torch.testing.assert_close(loss, 0.5 * (q - mu).square().mean())
    loss.backward()
    torch.testing.assert_close(q.grad, 2 * 0.5 * (q.detach() - mu) / q.numel())


def test_gradients():
    layer = make(width=4, clusters=2, commitment=1.0, ema=1.0)
    x = inputs(6, B=1, width=4).requires_grad_()
    # a small step: a larger one would change who is in which cluster
    assert torch.autograd.gradcheck(lambda x: (layer(x).y, layer(x).loss), (x,), eps=1e-7, atol=1e-4)
    out = layer(x)
    (out.y.sum() + out.loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_centroids_stay_float32_when_the_layer_is_cast():
    layer = make()
    before = layer.centroids.clone()
    layer.bfloat16()
    assert torch.equal(layer.centroids, before)
    y, state, loss = layer(inputs(9).bfloat16())
    loss.backward()
    assert y.dtype == state.q.dtype == torch.bfloat16 and layer.centroids.dtype == torch.float32
    assert y.isfinite().all() and layer.to("meta").centroids.is_meta


def test_rotation_keeps_distances():
    q, k = torch.randn(1, 1, 1, 6, dtype=torch.float64), torch.randn(1, 1, 1, 6, dtype=torch.float64)
    near = (rotate(q, 3, 100.0) * rotate(k, 1, 100.0)).sum()
    far = (rotate(q, 53, 100.0) * rotate(k, 51, 100.0)).sum()
    torch.testing.assert_close(near, far, atol=1e-5, rtol=1e-5)
    assert torch.equal(rotate(q, 0, 100.0), q)


def test_repr_and_errors():
    assert "heads=4, local_heads=2, head_dim=6, clusters=3, window=4, recent=3" in repr(make())
    with pytest.raises(InputError, match="one or more to route"):
        make(local_heads=4)
    with pytest.raises(InputError, match="clusters must be an int >= 1, got 0"):
        make(clusters=0)
    with pytest.raises(InputError, match="even"):
        RoutingAttention(9, 3, head_dim=3)
    with pytest.raises(InputError, match=r"\[5, 12\]"):
        make()(torch.zeros(5, 12, dtype=torch.float64))
