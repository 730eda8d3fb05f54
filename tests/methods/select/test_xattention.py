"""What is true of XAttention: antidiagonals of squares, softmax over them, and the fewest blocks for the threshold."""

import math

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Full
from saccade.methods.controls.random import Random
from saccade.methods.select.pooled import Pooled
from saccade.methods.select.streaming import Streaming
from saccade.methods.select.xattention import XAttention, antidiagonal_mass


def block_mass(q, k, start, stride, block):
    """Mass per (query block, key block) of one head, q [N][D], k [M][D] lists of floats, pair by pair."""
    N, M, D = len(q), len(k), len(k[0])
    mass = [[0.0] * -(-M // block) for _ in range(-(-N // block))]
    for a in range(0, N, stride):
        last = start + min(a + stride, N) - 1
        logits = []
        for b in range(0, last + 1, stride):
            total = 0.0
            for p in range(stride):
                i, j = a + stride - 1 - p, b + p
                if i < N and j < M:
                    total += sum(x * y for x, y in zip(q[i], k[j], strict=True))
            logits.append(total / math.sqrt(D) / stride)
        weights = [math.exp(x - max(logits)) for x in logits]
        for at, weight in enumerate(weights):
            mass[a // block][at * stride // block] += weight / sum(weights)
    return mass


def chosen(mass, N, M, threshold, block, most):
    """Blocks of each query block: the first, its own, then the heaviest until the share is reached."""
    lists = []
    for line, row in enumerate(mass):
        first, last = M - N + line * block, M - N + min((line + 1) * block, N) - 1
        taken = sorted({0, *range(first // block, last // block + 1)}, key=lambda j: -row[j])
        rest = sorted(set(range(last // block + 1)) - set(taken), key=lambda j: -row[j])
        while rest and sum(row[j] for j in taken) < threshold * sum(row):
            taken.append(rest.pop(0))
        lists.append(sorted(taken[: max(3, math.ceil(most * len(row)))]))
    return lists


LENGTHS = [(n, n) for n in (1, 7, 15, 16, 17, 63, 64, 65, 200)]


@pytest.mark.parametrize(("N", "M"), [*LENGTHS, (2, 90), (16, 64), (33, 100), (50, 51)])
@pytest.mark.parametrize(("threshold", "stride", "block", "most"), [(0.7, 4, 16, 1.0), (0.9, 6, 12, 0.3)])
def test_matches_paper_loop(N, M, threshold, stride, block, most):
    torch.manual_seed(N + M)
    q, k = torch.randn(2, 4, N, 3, dtype=torch.float64) * 3, torch.randn(2, 2, M, 3, dtype=torch.float64) * 3
    v, call = torch.randn(2, 2, M, 5, dtype=torch.float64), Call.of(q, k)
    method = XAttention(threshold, stride, block, most)
    got, pattern = antidiagonal_mass(q, k, call, stride, block), method.select(q, k, call)
    want = torch.zeros(2, 4, N, M, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            mass = block_mass(q[b, h].tolist(), k[b, h // 2].tolist(), M - N, stride, block)
            torch.testing.assert_close(got[b, h], torch.tensor(mass, dtype=torch.float64))
            lists = chosen(mass, N, M, threshold, block, most)
            assert [[j for j in row if j >= 0] for row in pattern.index[b, h].tolist()] == lists
            for line, blocks in enumerate(lists):
                for j in blocks:
                    want[b, h, line * block : (line + 1) * block, j * block : (j + 1) * block] = True
    want &= Full().mask(call)
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=want, enable_gqa=True)
    torch.testing.assert_close(method.attend(q, k, v, call).o, o, atol=1e-9, rtol=1e-9)


def test_tiles_do_not_matter(monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 300, 4), torch.randn(1, 1, 333, 4)
    call, method = Call.of(q, k), XAttention(stride=4, block=16)
    small, cost = antidiagonal_mass(q, k, call, 4, 16), method.estimate(call)
    # a square of 4 x 4 costs 4 products; tiles of one query block look ahead by no more than that block
    assert 2 * 300 * (33 + 150) / 4 < cost < 2 * 300 * (33 + 150 + 16) / 4
    monkeypatch.setattr("saccade.methods.select.xattention.PIECES", 1)
    torch.testing.assert_close(antidiagonal_mass(q, k, call, 4, 16), small)
    assert cost < method.estimate(call) <= 2 * 300 * 336 / 4
    monkeypatch.setattr("saccade.methods.select.xattention.TILE", 1)
    assert method.estimate(call) == cost


def planted(N, offset, seed, D=256, strength=24.0):
    """One head whose rows look at one diagonal; those on either side are half as strong and negative: means cancel."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randn(N + 2, D, generator=g).sign() * math.sqrt(strength / D)
    k = codes[1:-1] - codes[:-2] / 2 - codes[2:] / 2
    q = torch.cat((torch.zeros(offset, D), codes[1 : N - offset + 1]))
    return q[None, None], k[None, None]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finds_a_diagonal_that_means_cancel(seed):
    N, block, most = 2048, 64, 0.125
    q, k = planted(N, 901, seed)
    call = Call.of(q, k, scale=1.0)
    probs = torch.softmax((q @ k.transpose(-1, -2)).masked_fill(~Full().mask(call), -math.inf), -1)

    def kept(method):
        pattern = method.select(q, k, call)
        return float((probs * pattern.mask(call))[:, :, 1000:].sum(-1).mean()), pattern.density(call)

    mass, cost = kept(XAttention(0.9, 4, block, most))
    assert mass > 0.95
    budget = int(N * most)
    for other in (Pooled(budget=budget), Random(budget=budget), Streaming(sink=64, recent=budget)):
        other_mass, other_cost = kept(other)
        assert other_cost > 0.95 * cost
        assert other_mass < 0.4, other


def test_sees_columns_wherever_they_stand():
    for column in range(200, 208):
        q, k = torch.ones(1, 1, 1024, 1), torch.zeros(1, 1, 1024, 1)
        k[0, 0, column] = 80.0
        index = XAttention(stride=8, block=64, most=0.25).select(q, k, Call.of(q, k)).index[0, 0]
        assert (index[4:] == column // 64).any(-1).all()


def test_the_threshold_adapts_to_the_head():
    torch.manual_seed(0)
    q, k = torch.ones(1, 2, 1024, 1), torch.randn(1, 2, 1024, 1) * 0.1
    k[0, 0, 320:340] = 90.0
    index = XAttention(stride=8, block=64, most=1.0).select(q, k, Call.of(q, k)).index
    peaked, flat = (index[0] >= 0).sum(-1)[:, 8:].float().mean(-1)
    assert peaked <= 3  # the first, its own and the peak
    assert flat > 9
    counts = [
        (XAttention(t, 8, 64, 1.0).select(q, k, Call.of(q, k)).index >= 0).sum() for t in (0.1, 0.5, 0.9, 0.99, 1.0)
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 2 * 16 * 17 / 2


def test_most_bounds_every_row_and_keeps_the_heaviest():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 2048, 8), torch.randn(1, 1, 2048, 8)
    call = Call.of(q, k)
    index = XAttention(1.0, 8, 64, 0.2).select(q, k, call).index
    assert index.shape == (1, 1, 32, 7)
    mass = antidiagonal_mass(q, k, call, 8, 64)[0, 0, 31]
    others = mass[1:31].topk(5).indices + 1
    assert sorted(index[0, 0, 31].tolist()) == sorted([0, 31, *others.tolist()])


@pytest.mark.parametrize("N", [1, 100, 333])
def test_dense_at_full_budget(N):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, N, 8, dtype=torch.float64) * 9 for h in (2, 1, 1))
    call, method = Call.of(q, k), XAttention(1.0, 8, 64, 1.0)
    assert method.select(q, k, call).density(call) == 1.0
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(method.attend(q, k, v, call).o, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "args",
    [
        *({"threshold": t} for t in (0.0, 1.5, -1.0, True, "0.9")),
        *({"most": m} for m in (0.0, 2, -0.1)),
        *({"stride": s} for s in (0, 2.0, 7)),
        *({"block": b} for b in (0, -8, 60)),
    ],
)
def test_refuses(args):
    with pytest.raises(InputError, match="XAttention"):
        XAttention(**args)


def test_refuses_holes_and_looking_ahead():
    q, k = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 2)
    holes = Call.of(q, k, q_pos=torch.tensor([[8, 9]]), k_pos=torch.tensor([[[0, 8, 9]]]))
    for call in (holes, Call.of(q, k, causal=False)):
        with pytest.raises(UnsupportedError, match="XAttention"):
            XAttention().select(q, k, call)
