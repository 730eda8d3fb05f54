"""What is true of ActQKV: unusual tokens lead a window's probe, and layers that are unsure get more blocks."""

import math

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Full
from saccade.kernels.attend import attend
from saccade.methods.decode.actqkv import ActQKV

SMALL = dict(window=8, block_k=4, sink=4, near=4)


def drawn(B, H, G, N, M, D=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, heads, n, D, generator=g, dtype=torch.float64) for heads, n in ((H, N), (G, M), (G, M))]


def weights(rows, temperature):
    """Weights of the queries [n][D] of one window, in plain floats: one head."""
    n, D = len(rows), len(rows[0])
    mean = [sum(r[d] for r in rows) / n for d in range(D)]
    variance = [sum((r[d] - mean[d]) ** 2 for r in rows) / n for d in range(D)]
    bias = [sum((r[d] - mean[d]) ** 2 / variance[d] if variance[d] > 0 else 0.0 for d in range(D)) / D for r in rows]
    return bias, [b / temperature for b in bias]


def probes(q, window, temperature, together):
    """The probe of each window of one row q [H][N][D]: [H][windows] tensors."""
    H, N = len(q), len(q[0])
    out = [[] for _ in range(H)]
    for a in range(0, N, window):
        part = [q[h][a : a + window] for h in range(H)]
        bias = [weights(rows, 1.0)[0] for rows in part]
        if together:
            bias = [[sum(b[i] for b in bias) / H for i in range(len(part[0]))]] * H
        for h in range(H):
            e = [math.exp(b / temperature) for b in bias[h]]
            rows = torch.tensor(part[h], dtype=torch.float64)
            out[h].append(torch.tensor(e, dtype=torch.float64) @ rows / sum(e))
    return out


def means(k, block):
    """Mean key of each whole block of k [M,D]."""
    return [k[a : a + block].mean(0) for a in range(0, len(k) - block + 1, block)]


def sets(method, offset, rows, M):
    """Blocks that rows (first, last) always read, and those that they may retrieve, by their positions."""
    first, last = offset + rows[0], offset + rows[1]
    b = method.block_k
    sink = {j // b for j in range(min(method.sink, M))}
    near = {j // b for j in range(max(0, first - method.near), last + 1)}
    old = [j for j in range(min(near)) if j * b >= method.sink]
    return sink | near, old


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("N", "past"), [(60, 0), (64, 0), (17, 50), (41, 23)])
def test_prompt_matches_a_loop(N, past, together):
    M = N + past
    q, k, v = drawn(2, 4, 2, N, M, seed=N)
    method = ActQKV(budget=32, average=1.0, temperature=0.5, together=together, **SMALL)
    call = Call.of(q, k)
    pattern = method.select(q, k, call)
    total = method._always(8) + method._retrieved(8)
    for b in range(2):
        asked = probes(q[b].tolist(), 8, 0.5, together)
        for h in range(4):
            summary = means(k[b, h // 2], 4)
            for w in range(-(-N // 8)):
                must, old = sets(method, past, (8 * w, min(8 * w + 8, N) - 1), M)
                score = {j: float(asked[h][w] @ summary[j]) for j in old}
                want = must | set(sorted(old, key=lambda j, s=score: -s[j])[: total - len(must)])
                assert {j for j in pattern.index[b, h, w].tolist() if j >= 0} == want
    o = method.attend(q, k, v, Call.of(q, k)).o
    probs = (q.unflatten(1, (2, 2)) @ k[:, :, None].transpose(-1, -2)).flatten(1, 2) / 8**0.5
    want = torch.softmax(probs.masked_fill(~pattern.mask(call), -math.inf), -1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(o, want)


def test_probe_weights():
    method = ActQKV(budget=64, temperature=0.05, **SMALL)
    same = torch.ones(1, 2, 8, 4, dtype=torch.float64)
    torch.testing.assert_close(method.probe(same), same[:, :, :1])
    # one unusual token of eight leads, wherever the window's mean lies and however a feature is scaled
    odd = 0.01 * torch.randn(1, 2, 8, 4, dtype=torch.float64)
    odd[:, :, 5] += 1.0
    for shift, scale in ((0.0, 1.0), (7.0, 1.0), (0.0, torch.tensor([1.0, 10.0, 0.1, 3.0], dtype=torch.float64))):
        moved = odd * scale + shift
        torch.testing.assert_close(method.probe(moved), moved[:, :, 5:6], atol=1e-6, rtol=1e-6)
    # a high temperature is the mean; a short last window counts its own tokens only
    flat = ActQKV(budget=64, temperature=1e9, **SMALL)
    x = torch.randn(1, 2, 11, 4, dtype=torch.float64)
    torch.testing.assert_close(flat.probe(x), torch.stack((x[:, :, :8].mean(2), x[:, :, 8:].mean(2)), 2))


def test_a_window_looks_at_nothing_after_it():
    q, k, _ = drawn(1, 2, 1, 64, 64)
    method = ActQKV(budget=32, **SMALL)
    before = method.select(q, k, Call.of(q, k)).index
    for t in (q, k):
        t[:, :, 40:] = torch.randn_like(t[:, :, 40:])
    after = method.select(q, k, Call.of(q, k)).index
    assert torch.equal(before[:, :, :5], after[:, :, :5]) and not torch.equal(before, after)


def spread(scores):
    """Normalised entropy of the softmax of a list."""
    p = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
    return float(-(p * p.log()).sum()) / math.log(len(scores)) if len(scores) > 1 else 1.0


@pytest.mark.parametrize("together", [True, False])
def test_steps_match_a_loop(together):
    # three layers, a prompt, then single steps: budgets from the entropies of the steps before
    layers = [drawn(2, 2, 1, 100, 100, seed=n) for n in range(3)]
    layers[1][0].mul_(6.0)  # this layer knows what it wants
    method = ActQKV(budget=60, adapt=0.25, together=together, **SMALL)
    memories = [{} for _ in layers]
    usual, most = method._retrieved(1), 15 - method._always(1)
    running = None
    for M in (80, *range(81, 101)):
        step, now = {}, torch.zeros(2, 2, 3, dtype=torch.float64)
        for n, (q, k, _) in enumerate(layers):
            start = 0 if M == 80 else M - 1
            qq, kk = q[:, :, start:M], k[:, :, :M]
            call = Call.of(qq, kk, layer=n, memory=memories[n], step=step)
            pattern = method.select(qq, kk, call)
            for b in range(2):
                summary = torch.stack(means(kk[b, 0], 4))
                asked = probes(qq[b].tolist(), 8, 1.0, together)
                first = M - 8 if M == 80 else M - 1
                must, old = sets(method, first, (0, M - 1 - first), M)
                for h in range(2):
                    x = asked[h][-1] if M == 80 else qq[b, h, 0]
                    score = dict(zip(old, (summary[old] @ x).tolist(), strict=True))
                    now[b, h, n] = spread([s / 8**0.5 for s in score.values()])
                    if M > 80:
                        share = running[b, h, n] / running[b, h].mean()
                        count = max(1, min(most, round(float(usual * share))))
                        want = must | set(sorted(old, key=lambda j, s=score: -s[j])[:count])
                        assert {j for j in pattern.index[b, h, 0].tolist() if j >= 0} == want
        now = now.mean(1, keepdim=True).expand(-1, 2, -1) if together else now
        running = now if running is None else 0.75 * running + 0.25 * now
    assert (running[..., 1] < 0.8 * running[..., 0]).all()


def turns(method, spreads, steps=40):
    """Blocks that each layer retrieves in the end, where layers have fixed entropies."""
    memories = [{} for _ in spreads]
    k = torch.zeros(1, 1, 400, 1, dtype=torch.float64)
    k[0, 0, 100:104] = 1.0
    for M in range(400 - steps, 401):
        step, found = {}, []
        for n, sharp in enumerate(spreads):
            q = torch.full((1, 1, 1, 1), sharp, dtype=torch.float64)
            call = Call.of(q, k[:, :, :M], layer=n, memory=memories[n], step=step)
            index = method.select(q, k[:, :, :M], call).index
            must, _ = sets(method, M - 1, (0, 0), M)
            found.append(int((index >= 0).sum()) - len(must))
    return found


def test_layers_share_a_budget():
    method = ActQKV(budget=160, adapt=0.5, **SMALL)
    usual = method._retrieved(1)
    assert turns(method, [0.0, 0.0, 0.0]) == [usual] * 3
    # one layer is certain: least for it, the others share what it leaves
    found = turns(method, [0.0, 60.0, 0.0])
    assert found[1] == 1 and found[0] == found[2] > usual
    assert abs(sum(found) - 3 * usual) <= 3
    assert turns(ActQKV(budget=160, adapt=0.0, **SMALL), [0.0, 60.0, 0.0]) == [usual] * 3
    # most is the budget
    assert max(turns(ActQKV(budget=160, average=0.9, adapt=0.5, **SMALL), [0.0, 60.0, 60.0])) <= 40 - method._always(1)


def test_a_draft_that_is_taken_back_leaves_no_entropy():
    layers = [drawn(1, 2, 1, 140, 140, seed=n) for n in range(3)]
    other = [drawn(1, 2, 1, 140, 140, seed=n + 9) for n in range(3)]
    other[0][0].mul_(20.0)
    method = ActQKV(budget=60, adapt=0.5, **SMALL)

    def forward(tensors, M, n, memories):
        step, found = {}, []
        for at, (q, k, _) in enumerate(tensors):
            call = Call.of(q[:, :, M - n : M], k[:, :, :M], layer=at, memory=memories[at], step=step)
            found.append(method.select(q[:, :, M - n : M], k[:, :, :M], call))
        return found

    plain, drafted = [{} for _ in layers], [{} for _ in layers]
    for memories in (plain, drafted):
        forward(layers, 80, 80, memories)
    M = 80
    for guessed, size in ((3, 1), (16, 2), (9, 5), (1, 16), (12, 1)):
        joined = [
            [torch.cat((a[:, :, :M], b[:, :, M:]), 2) for a, b in zip(x, y, strict=True)]
            for x, y in zip(layers, other, strict=True)
        ]
        forward(joined, M + guessed, guessed, drafted)
        pairs = zip(forward(layers, M + size, size, drafted), forward(layers, M + size, size, plain), strict=True)
        assert all(torch.equal(a.index, b.index) for a, b in pairs)
        M += size


def planted(anchors, seed):
    """128 queries of which some ask for a planted block, 64 blocks of 16 keys: q, k, and the block."""
    g = torch.Generator().manual_seed(seed)
    D, blocks = 32, 72
    k = torch.randn(1, 1, 16 * blocks, D, generator=g, dtype=torch.float64)
    at = int(torch.randint(1, 60, (1,), generator=g))
    want = torch.nn.functional.normalize(torch.randn(D, generator=g, dtype=torch.float64), dim=0)
    k[0, 0, 16 * at : 16 * at + 16] += 1.2 * want
    # fillers lie around a common mean that has nothing to do with the question, and wander in the last few features
    common = torch.randn(D, generator=g, dtype=torch.float64)
    q = common + 0.3 * torch.randn(1, 1, 128, D, generator=g, dtype=torch.float64)
    asks = torch.randperm(128, generator=g)[:anchors]
    q[0, 0, asks] += 6.0 * want
    return q, k, at, asks


def test_weighted_probe_finds_what_a_mean_loses():
    # recall of a planted block by the probe: three question tokens among 125 fillers, nearly all, or all
    method = ActQKV(budget=640, window=128, block_k=16, sink=16, near=16)
    hits = {}
    for anchors in (3, 120, 128):
        found = dict.fromkeys(("weighted", "mean", "last", "norm", "oracle"), 0)
        for seed in range(40):
            q, k, at, asks = planted(anchors, seed)
            summary = k[0, 0].unflatten(0, (-1, 16)).mean(1)[:60]
            rows = q[0, 0]
            made = {
                "weighted": method.probe(q)[0, 0, 0],
                "mean": rows.mean(0),
                "last": rows[-1],
                "norm": rows[rows.norm(dim=-1).argmax()],
                "oracle": rows[asks].mean(0),
            }
            for name, probe in made.items():
                found[name] += int(at in (summary @ probe).topk(3).indices.tolist())
        hits[anchors] = found
    few, most, alike = hits[3], hits[120], hits[128]
    assert few["oracle"] >= 34
    assert few["weighted"] >= few["oracle"] - 4
    assert few["mean"] <= few["weighted"] - 15 and few["last"] <= few["weighted"] - 15
    # control: where every token asks, the mean is as good
    assert abs(alike["weighted"] - alike["mean"]) <= 2
    # and where few do not ask, it is they who are unusual: the weakness of the idea
    assert most["weighted"] <= most["mean"] - 15


def test_the_planted_block_is_read():
    # the same through select: the last window of a prompt reads the block, with the probe as only difference
    q, k, at, _ = planted(3, 5)
    filler = q[:, :, -1:].expand(-1, -1, 1152 - 128, -1)
    q = torch.cat((filler, q), 2)
    args = dict(budget=320, average=0.5, window=128, block_k=16, sink=16, near=16)
    call = Call.of(q, k)
    assert at in ActQKV(**args).select(q, k, call).index[0, 0, -1].tolist()
    assert at not in ActQKV(temperature=1e9, **args).select(q, k, call).index[0, 0, -1].tolist()


def test_dense_while_the_budget_covers_the_store():
    q, k, v = drawn(1, 2, 1, 60, 60)
    method = ActQKV(budget=60, **SMALL)
    call = Call.of(q, k)
    assert isinstance(method.select(q, k, call), Full) and method.estimate(call) == 0
    want = attend(q, k, v, Full(), call).o
    torch.testing.assert_close(method.attend(q, k, v, call).o, want)


def test_estimate_counts_probes_and_blocks():
    method = ActQKV(budget=32, **SMALL)
    assert method.estimate(Call.of(*drawn(2, 4, 2, 60, 100)[:2])) == 2 * 4 * 8 * 25
    assert method.estimate(Call.of(*drawn(2, 4, 2, 3, 101)[:2])) == 2 * 4 * 3 * 25


def test_padded_rows_and_evicted_stores_are_refused():
    q, k, _ = drawn(1, 2, 1, 1, 50)
    pos = torch.arange(50)[None, None].clone()
    pos[..., :5] = -1
    with pytest.raises(UnsupportedError, match=r"ActQKV: needs .* row"):
        ActQKV(budget=32, **SMALL).select(q, k, Call.of(q, k, q_pos=torch.tensor([[49]]), k_pos=pos))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"budget": 0}, "budget"),
        ({"budget": 0.5}, "budget"),
        ({"budget": 20}, "at least 24"),
        ({"average": 0.0}, "average"),
        ({"temperature": 0.0}, "temperature"),
        ({"adapt": 1.5}, "adapt"),
        ({"window": 0}, "window"),
    ],
)
def test_refuses(args, said):
    with pytest.raises(InputError, match=f"ActQKV.*{said}"):
        ActQKV(**{"budget": 32, **SMALL, **args})
