"""What is true of TidalDecode: two layers pick, all others read what was picked."""

import math

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Full, Tokens
from saccade.methods.decode.tidal import TidalDecode


def layers_of(count, B, H, G, N, M, D=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(B, heads, n, D, generator=g, dtype=torch.float64) for heads, n in ((H, N), (G, M), (G, M)))
        for _ in range(count)
    ]


def run(method, layers, **fields):
    """All layers of one forward: patterns and outputs."""
    step, patterns, outs = {}, [], []
    for n, (q, k, v) in enumerate(layers):
        patterns.append(method.select(q, k, Call.of(q, k, layer=n, step=step, **fields)))
        outs.append(method.attend(q, k, v, Call.of(q, k, layer=n, step=step, **fields)).o)
    return patterns, outs


def tidal(layers, budget, first, correct, keep_newest):
    """The paper's decode step for one query in plain floats: outputs [layer][b][h] and the set each layer reads."""
    outs, sets, held = [], [], {}
    for n, (q, k, v) in enumerate(layers):
        B, H, _, D = q.shape
        G, M = k.shape[1:3]
        outs.append({})
        sets.append({})
        for b in range(B):
            for h in range(H):
                g = h * G // H
                keys, values = k[b, g].tolist(), v[b, g].tolist()
                scores = [
                    sum(x * y for x, y in zip(q[b, h, 0].tolist(), key, strict=True)) / math.sqrt(D) for key in keys
                ]
                read = range(M)
                if budget < M and n >= first:
                    if n in (first, correct):
                        ranked = sorted(range(M - 1 if keep_newest else M), key=lambda j, s=scores: -s[j])
                        held[b, h] = {*ranked[: budget - 1], M - 1} if keep_newest else set(ranked[:budget])
                    else:
                        read = held[b, h]
                weights = {j: math.exp(scores[j]) for j in read}
                outs[-1][b, h] = [
                    sum(weights[j] * values[j][d] for j in read) / sum(weights.values()) for d in range(len(values[0]))
                ]
                sets[-1][b, h] = set(read)
    return outs, sets


@pytest.mark.parametrize("M", [1, 7, 63, 64, 65, 127, 128, 129, 200, 1000])
@pytest.mark.parametrize("keep_newest", [True, False])
def test_matches_paper_loop(M, keep_newest):
    layers = layers_of(7, 2, 4, 2, 1, M, seed=M)
    method = TidalDecode(budget=16, first=1, correct=4, keep_newest=keep_newest)
    patterns, outs = run(method, layers)
    want, sets = tidal(layers, 16, 1, 4, keep_newest)
    for n, (pattern, o) in enumerate(zip(patterns, outs, strict=True)):
        assert isinstance(pattern, Full) == (M <= 16 or n in (0, 1, 4))
        for (b, h), row in want[n].items():
            torch.testing.assert_close(o[b, h, 0], torch.tensor(row, dtype=torch.float64), atol=1e-9, rtol=1e-9)
            if isinstance(pattern, Tokens):
                read = pattern.index[b, h, 0].tolist()
                assert len(read) == 16
                assert set(read) == sets[n][b, h]
                assert M - 1 in read or not keep_newest


def test_by_hand():
    # scores 3 1 4 1 5 0: the two best are slots 4 and 2, the newest is slot 5
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 0.0]).view(1, 1, 6, 1)
    for keep_newest, want in ((True, {4, 2, 5}), (False, {4, 2, 0})):
        patterns, _ = run(TidalDecode(budget=3, first=0, keep_newest=keep_newest), [(q, k, k)] * 2)
        assert isinstance(patterns[0], Full)
        assert set(patterns[1].index.flatten().tolist()) == want


def test_second_pick_replaces_the_first():
    layers = layers_of(8, 1, 2, 1, 1, 100)
    patterns, _ = run(TidalDecode(budget=10, first=2, correct=5), layers)
    assert [isinstance(p, Full) for p in patterns] == [True, True, True, False, False, True, False, False]
    assert torch.equal(patterns[3].index, patterns[4].index)
    assert torch.equal(patterns[6].index, patterns[7].index)
    assert not torch.equal(patterns[4].index, patterns[6].index)


def test_first_layer_that_may_differ_from_dense():
    layers = layers_of(6, 1, 2, 2, 1, 100)
    _, outs = run(TidalDecode(budget=4, first=2, correct=4), layers)
    _, dense = run(TidalDecode(budget=1.0), layers)
    same = [torch.allclose(a, b, atol=1e-9) for a, b in zip(outs, dense, strict=True)]
    assert same == [True, True, True, False, True, False]


def test_dense_when_the_budget_covers_the_store():
    layers = layers_of(5, 1, 4, 2, 1, 64)
    patterns, outs = run(TidalDecode(budget=64, first=0, correct=2), layers)
    assert all(isinstance(p, Full) for p in patterns)
    for (q, k, v), o in zip(layers, outs, strict=True):
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        torch.testing.assert_close(o, want, atol=1e-9, rtol=1e-9)


def test_never_picks_again_beyond_the_last_layer():
    patterns, _ = run(TidalDecode(budget=4, first=1, correct=99), layers_of(5, 1, 1, 1, 1, 50))
    assert [isinstance(p, Full) for p in patterns] == [True, True, False, False, False]
    assert torch.equal(patterns[2].index, patterns[4].index)


def test_layers_that_agree_lose_nothing():
    # same q and k in all layers: the pick of layer 2 is each layer's own top
    [(q, k, v)] = layers_of(1, 1, 2, 1, 1, 300)
    patterns, _ = run(TidalDecode(budget=20, keep_newest=False), [(q, k, v)] * 6)
    own = (q @ k.transpose(-1, -2)).topk(20).indices.sort(-1).values
    assert torch.equal(patterns[5].index.long().sort(-1).values, own)


def test_each_of_several_queries_has_its_own_pick():
    layers = layers_of(4, 2, 2, 1, 3, 60)
    patterns, _ = run(TidalDecode(budget=8, first=1, correct=9), layers)
    q, k, _ = layers[1]
    assert patterns[2].index.shape == (2, 2, 3, 8)
    for row in range(3):
        newest = 57 + row
        scores = (q[:, :, row : row + 1] @ k[:, :, :newest].transpose(-1, -2)).topk(7).indices
        want = torch.cat((scores, torch.full((2, 2, 1, 1), newest)), -1).sort(-1).values
        assert torch.equal(patterns[2].index[:, :, row : row + 1].long().sort(-1).values, want)


def test_queries_that_see_less_than_the_budget():
    # 10 queries, 12 keys, a budget of 6: the first query sees 3 keys
    layers = layers_of(3, 1, 1, 1, 10, 12)
    patterns, outs = run(TidalDecode(budget=6, first=0, correct=9), layers)
    q, k, v = layers[1]
    assert sorted(patterns[1].index[0, 0, 0].tolist()) == [-1, -1, -1, 0, 1, 2]
    assert patterns[1].mask(Call.of(q, k))[0, 0].sum(-1).tolist() == [3, 4, 5, *[6] * 7]
    want = torch.softmax(q[0, 0, 0] @ k[0, 0, :3].T / 2, -1) @ v[0, 0, :3]
    torch.testing.assert_close(outs[1][0, 0, 0], want)


def test_padded_slots_are_never_picked():
    layers = layers_of(3, 2, 2, 1, 1, 40)
    k_pos = torch.stack((torch.arange(40), torch.arange(40) - 15))[:, None].clamp_min(-1)
    q_pos = torch.tensor([[39], [24]])
    method = TidalDecode(budget=12, first=0, correct=9)
    patterns, outs = run(method, layers, q_pos=q_pos, k_pos=k_pos)
    picked = patterns[1].index[1]
    assert picked.min() >= 15
    assert (picked == 39).any(-1).all()
    alone, one = run(
        method, [tuple(t[1:, :, -n:] for t, n in zip(layer, (1, 25, 25), strict=True)) for layer in layers]
    )
    assert torch.equal(alone[1].index[0].sort(-1).values + 15, picked.sort(-1).values)
    torch.testing.assert_close(outs[2][1:], one[2])


def test_batch_rows_are_independent():
    layers = layers_of(4, 3, 2, 1, 1, 80)
    _, together = run(TidalDecode(budget=8, first=0, correct=2), layers)
    for b in range(3):
        _, alone = run(TidalDecode(budget=8, first=0, correct=2), [tuple(t[b : b + 1] for t in x) for x in layers])
        torch.testing.assert_close(torch.stack(together)[:, b : b + 1], torch.stack(alone))


def test_head_sets_do_not_mix():
    layers, method, step, whole = layers_of(3, 1, 4, 2, 1, 80), TidalDecode(budget=8, first=0), {}, []
    for n, (q, k, _) in enumerate(layers):
        call = Call.of(q, k, layer=n, step=step)
        whole.append(method.select(q, k, call))
        for heads in ((0, 1), (2, 3)):
            part = method.select(q[:, list(heads)], k[:, [heads[0] // 2]], call.take(heads, (heads[0] // 2,)))
            if n:
                assert torch.equal(part.index, whole[-1].index[:, list(heads)])


def test_a_missing_pick_is_said():
    q, k = torch.randn(1, 4, 1, 4), torch.randn(1, 4, 50, 4)
    method, step = TidalDecode(budget=8, first=2, correct=4), {}
    said = r"TidalDecode: layer 3 reads what layer 2 picked for heads \[0, 1, 2, 3\], but none"
    with pytest.raises(InputError, match=said):
        method.select(q, k, Call.of(q, k, layer=3, step=step))
    method.select(q, k, Call.of(q, k, layer=2, step=step))
    method.select(q, k, Call.of(q, k, layer=3, step=step))
    with pytest.raises(InputError, match=r"layer 5 reads what layer 4 picked .* newest is layer 2's"):
        method.select(q, k, Call.of(q, k, layer=5, step=step))
    with pytest.raises(InputError, match=r"heads \[1\], but none was made"):
        method.select(q[:, :1], k[:, :1], Call.of(q, k, layer=3, step=step).take((1,), (1,)))
    # the next forward starts with nothing
    with pytest.raises(InputError, match="none was made"):
        method.select(q, k, Call.of(q, k, layer=3))


def test_estimate_counts_the_two_picking_layers():
    q, k = torch.zeros(2, 3, 1, 4), torch.zeros(2, 1, 500, 4)
    costs = [TidalDecode(budget=8, first=2, correct=4).estimate(Call.of(q, k, layer=n)) for n in range(6)]
    assert costs == [0, 0, 3000, 0, 3000, 0]
    assert TidalDecode(budget=500).estimate(Call.of(q, k, layer=2)) == 0


def test_a_second_pick_lifts_the_recall_of_deep_layers():
    # 20 layers that drift: neighbours look at much the same tokens, distant layers less so
    g = torch.Generator().manual_seed(0)
    M, budget = 600, 40
    q, k = torch.randn(1, 8, 1, 32, generator=g), torch.randn(1, 8, M, 32, generator=g)
    layers = []
    for _ in range(20):
        layers.append((q, k, k))
        q, k = (0.985 * t + 0.17 * torch.randn(t.shape, generator=g) for t in (q, k))

    truth = []
    for q, k, _ in layers:
        best = (q @ k.transpose(-1, -2)).topk(budget).indices
        truth.append(torch.zeros(1, 8, 1, M).scatter(3, best, 1.0))

    def recall(index, n):
        return truth[n].gather(3, index.long()).sum().item() / (8 * budget)

    def curve(correct):
        method = TidalDecode(budget=budget, first=2, correct=correct, keep_newest=False)
        patterns, _ = run(method, layers)
        return {n: recall(p.index, n) for n, p in enumerate(patterns) if isinstance(p, Tokens)}

    def mean(found):
        return sum(found[n] for n in deep) / len(deep)

    deep = range(14, 20)
    once, twice = curve(99), curve(13)
    tops = [t.nonzero()[:, 3].view(1, 8, 1, budget) for t in truth]
    anywhere = {n: sum(recall(tops[m], n) for m in range(n)) / n for n in deep}
    lot = {n: recall(torch.rand(1, 8, 1, M, generator=g).topk(budget).indices, n) for n in deep}
    assert recall(tops[13], 13) == 1.0
    assert {n: once[n] for n in range(3, 13)} == {n: twice[n] for n in range(3, 13)}
    assert twice[3] > 0.7
    assert twice[3] > twice[12]
    assert mean(twice) > mean(once) + 0.2
    assert mean(twice) > mean(anywhere) + 0.1
    assert mean(once) > mean(lot) + 0.1


@pytest.mark.parametrize(
    "args",
    [{"budget": 0}, {"budget": -1}, {"budget": 0.0}, {"first": -1}, {"first": 1.5}, {"first": 5, "correct": 3}],
)
def test_refuses(args):
    with pytest.raises(InputError, match="TidalDecode"):
        TidalDecode(**args)
