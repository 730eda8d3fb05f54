"""What is true of HyperAttention: sorted buckets, an unbiased sample of the rest, and halves that halve again."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.hf.meter import Meter
from saccade.methods.apply import apply
from saccade.methods.select.hyper import HyperAttention, buckets, integers, normal


def dense(q, k, v, causal=True):
    """Output and log-sum-exp of all keys, in the inputs' own precision."""
    share = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(share, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[3])
    if causal:
        N, M = scores.shape[2:]
        scores = scores.masked_fill(~torch.ones(N, M, dtype=torch.bool).tril(M - N), -math.inf)
    return torch.softmax(scores, -1) @ v, scores.logsumexp(-1)


def gray(bits):
    """Buckets by code word, from the table of the paper turned round."""
    words = [0, 1]
    for n in range(1, bits):
        words += [w + 2**n for w in reversed(words)]
    return {word: rank for rank, word in enumerate(words)}


def order(x, to):
    """Rows of x [n][D] sorted by bucket, earlier ones first."""
    table = gray(to.shape[1])
    codes = [sum((float(row @ to[:, j]) > 0) * 2**j for j in range(to.shape[1])) for row in x]
    return sorted(range(len(x)), key=lambda i: (table[codes[i]], i))


def across(q, k, v, method, start, head, at):
    """Numerators [n][Dv] and denominators [n] of one head's queries over keys that they may all see."""
    n, m, scale = len(q), len(k), 1 / math.sqrt(q.shape[1])
    blocks = -(-m // method.block)
    if m < method.exact_below or blocks == 1:
        weights = (q @ k.T * scale).exp()
        return weights @ v, weights.sum(-1)
    rows = -(-n // blocks)
    to = normal(start, (q.shape[1], method.bits)).double()
    queries, keys = order(q, to), order(k, to)
    drawn = integers(start, torch.tensor([head]), at, method.samples, m)[0].tolist()
    top, bottom = torch.zeros(n, v.shape[1], dtype=q.dtype), torch.zeros(n, dtype=q.dtype)
    for place, i in enumerate(queries):
        mine = place // rows
        for j in keys[mine * method.block : (mine + 1) * method.block]:
            weight = torch.exp(q[i] @ k[j] * scale)
            top[i] += weight * v[j]
            bottom[i] += weight
        for at_sorted in drawn:
            if at_sorted // method.block != mine:
                j = keys[at_sorted]
                weight = torch.exp(q[i] @ k[j] * scale) * m / method.samples
                top[i] += weight * v[j]
                bottom[i] += weight
    return top, bottom


def causal(q, k, v, method, start, head, at):
    """The same for queries among themselves."""
    n = len(q)
    if n <= method.exact_below:
        weights = (q @ k.T / math.sqrt(q.shape[1])).exp().tril()
        return weights @ v, weights.sum(-1)
    half = (n + 1) // 2
    a = causal(q[:half], k[:half], v[:half], method, start, head, at)
    b = causal(q[half:], k[half:], v[half:], method, start, head, at + half)
    c = across(q[half:], k[:half], v[:half], method, start, head, at)
    return torch.cat((a[0], b[0] + c[0])), torch.cat((a[1], b[1] + c[1]))


@pytest.mark.parametrize(("N", "M"), [(1, 1), (7, 7), (64, 64), (65, 65), (127, 127), (200, 200), (33, 120), (90, 97)])
@pytest.mark.parametrize("args", [(7, 5, 3, 16), (16, 0, 5, 20), (12, 30, 2, 1)])
def test_matches_paper_loop(N, M, args):
    torch.manual_seed(N)
    q, k = torch.randn(2, 4, N, 6, dtype=torch.float64), torch.randn(2, 2, M, 6, dtype=torch.float64)
    v, method = torch.randn(2, 2, M, 3, dtype=torch.float64), HyperAttention(*args, seed=3)
    call = Call.of(q, k, layer=2, heads=(0, 1, 4, 5))
    out, start, past = method.attend(q, k, v, call), method._start(call, q.device), M - N
    for b in range(2):
        for h, head in enumerate(call.heads):
            one = (q[b, h], k[b, h // 2], v[b, h // 2])
            if method.exact_below >= M:
                o, lse = (t[0, 0] for t in dense(*(t[None, None] for t in one)))
            else:
                top, bottom = causal(one[0], one[1][past:], one[2][past:], method, start, head, past)
                if past:
                    more = across(one[0], one[1][:past], one[2][:past], method, start, head, 0)
                    top, bottom = top + more[0], bottom + more[1]
                o, lse = top / bottom[:, None], bottom.log()
            torch.testing.assert_close(out.o[b, h], o, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(out.lse[b, h], lse, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("N", [1, 33, 64, 100, 257])
@pytest.mark.parametrize("args", [{"exact_below": 4096}, {"exact_below": 8, "block": 4096}, {"exact_below": 512}])
def test_exact_where_everything_is_small(N, args):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, N, 8), torch.randn(1, 2, N, 8), torch.randn(1, 2, N, 8)
    # with one block to each pair of halves, the halving is exact causal attention
    out = HyperAttention(**args).attend(q, k, v, Call.of(q, k))
    o, lse = dense(q, k, v)
    torch.testing.assert_close(out.o, o, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.lse, lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("N", "M"), [(40, 200), (200, 40), (1, 100)])
def test_without_causality(N, M):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (N, M, M))
    method = HyperAttention(block=16, samples=60_000, exact_below=1)
    if N > M:
        with pytest.raises(InputError, match="HyperAttention"):
            method.attend(q, k, v, Call.of(q, k, causal=False))
        return
    got = method.attend(q, k, v, Call.of(q, k, causal=False)).o
    want = dense(q, k, v, causal=False)[0]
    assert 0 < (got - want).norm() / want.norm() < 0.08


@pytest.mark.parametrize("bits", [1, 2, 3, 7])
def test_neighbouring_buckets_differ_in_one_sign(bits):
    # every code word once, as signs
    words = torch.tensor([[(w >> j & 1) * 2.0 - 1 for j in range(bits)] for w in range(2**bits)])
    rank = buckets(words[None, None], torch.eye(bits))[0, 0]
    assert sorted(rank.tolist()) == list(range(2**bits))
    ordered = words[rank.argsort()]
    assert ((ordered[1:] != ordered[:-1]).sum(-1) == 1).all()
    if bits == 3:
        assert rank.argsort().tolist() == [0, 1, 3, 2, 6, 7, 5, 4]


def test_the_denominator_is_unbiased():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 4, dtype=torch.float64) for n in (6, 40, 40))
    call, true = Call.of(q, k, causal=False), dense(q, k, v, causal=False)[1].exp()
    got = []
    for seed in range(1500):
        method = HyperAttention(block=8, samples=7, bits=3, exact_below=1, seed=seed)
        got.append(method.attend(q, k, v, call).lse.exp())
    got = torch.stack(got)
    far = (got.mean(0) - true).abs() / (got.std(0) / len(got) ** 0.5)
    assert far.max() < 4, far
    # precise enough to tell: samples in a query's own block, left in, would add a fifth
    assert (got.std(0) / len(got) ** 0.5 / true).max() < 0.02


def test_draws_are_even_and_independent():
    start = torch.tensor(12345)
    drawn = integers(start, torch.arange(32), 0, 4000, 10)
    assert drawn.min() == 0
    assert drawn.max() == 9
    counts = torch.stack([(drawn == i).sum(-1) for i in range(10)]).double()
    assert ((counts - 400).abs() < 5 * math.sqrt(400 * 0.9)).all()
    pairs = torch.corrcoef(drawn.double()) - torch.eye(32)
    assert pairs.abs().max() < 5 / math.sqrt(4000)
    assert not torch.equal(drawn, integers(start, torch.arange(32), 64, 4000, 10))
    assert torch.equal(drawn[[3, 7]], integers(start, torch.tensor([3, 7]), 0, 4000, 10))
    z = normal(start, (200, 200))
    assert abs(z.mean()) < 0.02
    assert abs(z.std() - 1) < 0.02
    assert abs((z.abs() < 1).double().mean() - 0.6827) < 0.01


def clustered(N, clusters, g, D=64, strength=5.0):
    """Queries and keys of the same clusters, in random order: large entries within a cluster, small ones elsewhere.

    A value says which cluster its key is of, so that what lies outside of a query's cluster counts.
    """
    centres = torch.nn.functional.normalize(torch.randn(clusters, D, generator=g), dim=-1) * (strength * 8) ** 0.5
    pick = torch.randint(clusters, (2, N), generator=g)
    q, k = centres[pick] + torch.randn(2, N, D, generator=g) * 0.1
    v = torch.randn(clusters, D, generator=g)[pick[1]]
    return q[None, None], k[None, None], v[None, None]


def error(method, q, k, v, want):
    return float((method.attend(q, k, v, Call.of(q, k)).o - want).norm() / want.norm())


def test_both_parts_beat_each_alone_where_large_entries_exist():
    g = torch.Generator().manual_seed(0)
    q, k, v = clustered(4096, 64, g)
    want = dense(q, k, v)[0]
    both = HyperAttention(block=128, samples=128, exact_below=512)
    blocks, sample = replace(both, samples=0, block=256), replace(both, block=1, samples=255)
    found = [error(m, q, k, v, want) for m in (both, blocks, sample)]
    cost = [m.estimate(Call.of(q, k)) for m in (both, blocks, sample)]
    assert max(cost) < 1.02 * min(cost)
    assert found[0] < 0.85 * min(found[1:]), found


def test_hashing_gains_nothing_without_clusters():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 2048, 64) for _ in range(3))
    want = dense(q, k, v)[0]
    both = HyperAttention(block=64, samples=64, exact_below=128)
    one, two = (error(m, q, k, v, want) for m in (both, replace(both, block=1, samples=127)))
    assert one > 0.9 * two


def test_the_error_falls_with_samples():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 512, 16, dtype=torch.float64) for _ in range(3))
    want = dense(q, k, v)[0]
    method = HyperAttention(block=16, exact_below=64)
    errors = [error(replace(method, samples=m), q, k, v, want) for m in (16, 64, 256, 1024, 4096)]
    for few, many in pairwise(errors):
        assert 0.3 < many / few < 0.7  # a half: one over the root of four
    assert errors[-1] < 0.1


def test_the_first_half_does_not_depend_on_the_second():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 256, 8, dtype=torch.float64) for _ in range(3))
    method, call = HyperAttention(block=8, samples=8, exact_below=16), Call.of(q, k)
    one = method.attend(q, k, v, call).o
    two = method.attend(*(torch.cat((t[:, :, :128], -2 * t[:, :, 128:]), 2) for t in (q, k, v)), call).o
    torch.testing.assert_close(one[:, :, :128], two[:, :, :128])
    # later queries of the same half move each other to other blocks, and nothing else: see `strictly_causal`
    changed = q.clone()
    changed[:, :, 250:] *= -3
    assert not torch.allclose(method.attend(changed, k, v, call).o[:, :, 128:250], one[:, :, 128:250])


def test_draws_follow_seed_layer_head_and_generator():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 100, 8) for _ in range(3))
    method = HyperAttention(block=8, samples=4, exact_below=16)

    def o(method=method, **fields):
        return method.attend(q, k, v, Call.of(q, k, **fields)).o

    assert torch.equal(o(), o())
    for other in (o(layer=1), o(replace(method, seed=1)), o(heads=(1, 2, 3, 4)), o(rng=torch.Generator())):
        assert not torch.allclose(o(), other)
    same, again, other = (o(rng=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.allclose(same, other)
    # two rows of a batch are drawn alike
    twice = [t.expand(2, -1, -1, -1) for t in (q, k, v)]
    both = method.attend(*twice, Call.of(*twice[:2])).o
    torch.testing.assert_close(both[0], both[1])


def test_the_estimate_counts_all_products():
    call = Call.of(torch.zeros(2, 3, 64, 2), torch.zeros(2, 1, 64, 2))
    method = HyperAttention(block=8, samples=5, bits=3, exact_below=16)
    across_16 = 2 * (16 * 8 + 16 * 5 + 32 * 3)
    across_32 = 32 * 8 + 32 * 5 + 64 * 3
    assert method.estimate(call) == 6 * (4 * 16 * 17 / 2 + across_16 + across_32)
    assert HyperAttention().estimate(call) == 6 * 64 * 65 / 2
    late = Call.of(torch.zeros(1, 1, 10, 2), torch.zeros(1, 1, 33, 2))
    # 23 keys before, in 3 blocks of 8, 8 and 7: 4 rows to each of the first two, 2 to the last
    assert method.estimate(late) == 10 * 11 / 2 + 8 * 8 + 2 * 7 + 10 * 5 + 33 * 3
    longer = Call.of(torch.zeros(1, 1, 32768, 1), torch.zeros(1, 1, 32768, 1))
    assert HyperAttention(128, 128, exact_below=2048).estimate(longer) < 0.1 * 32768 * 32769 / 2


def test_a_meter_reports_what_was_scored():
    torch.manual_seed(0)
    q = torch.randn(1, 4, 64, 8)
    method, meter = HyperAttention(block=8, samples=5, bits=3, exact_below=16), Meter()
    call = Call.of(q, q)
    apply(q, q, q, call, [((0, 2), method)], watch=meter)
    pairs = method.estimate(call.take((0, 2))) + 2 * 64 * 65 / 2
    assert meter.density("prefill") == pairs / (4 * 64 * 65 / 2)

    class Silent(HyperAttention):
        def estimate(self, call):
            return 0.0

    silent = Meter()
    apply(q, q, q, call, [((0, 2), Silent())], watch=silent)
    assert silent.density("prefill") is None


@pytest.mark.parametrize(
    "args",
    [
        *({"block": v} for v in (0, -1, 2.0, True)),
        *({"samples": v} for v in (-1, 0.5)),
        *({"bits": v} for v in (0, 31)),
        *({name: v} for name in ("exact_below", "seed") for v in (-1, 1.5)),
        {"exact_below": 0},
    ],
)
def test_refuses(args):
    with pytest.raises(InputError, match="HyperAttention"):
        HyperAttention(**args)


def test_refuses_holes():
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2)
    call = Call.of(q, k, q_pos=torch.tensor([[9]]), k_pos=torch.tensor([[[0, 4, 9]]]))
    with pytest.raises(UnsupportedError, match="HyperAttention"):
        HyperAttention().attend(q, k, k, call)


def test_half_precision_sorts_as_float32_does():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 600, 32).bfloat16() for _ in range(3))
    method = HyperAttention(block=16, samples=16, exact_below=64)
    half = method.attend(q, k, v, Call.of(q, k)).o
    full = method.attend(q.float(), k.float(), v.float(), Call.of(q, k)).o
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.02 * full.norm()
