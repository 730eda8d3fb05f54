"""What is true of FlexPrefill: two kinds of heads told apart by a divergence, and as many blocks as the mass needs."""

import math

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Full
from saccade.kernels.select.vertical_slash import column_and_offset_mass
from saccade.methods.controls.random import Random
from saccade.methods.select.flexprefill import FlexPrefill, block_sums, diagonal_sums, divergence
from saccade.methods.select.pooled import Pooled
from saccade.methods.select.streaming import Streaming


def fewest(mass, share, least=0):
    """The largest of a dict until their sum is the share of all, at least so many."""
    order, taken = sorted(mass, key=lambda j: -mass[j]), set()
    while order and (sum(mass[j] for j in taken) < share * sum(mass.values()) or len(taken) < least):
        taken.add(order.pop(0))
    return set(mass) if share >= 1 else taken


def softmax(scores, sizes):
    weights = [size * math.exp(x - max(scores)) for x, size in zip(scores, sizes, strict=True)]
    return [w / sum(weights) for w in weights]


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def means(rows, block):
    cut = [rows[a : a + block] for a in range(0, len(rows), block)]
    return [[sum(column) / len(part) for column in zip(*part, strict=True)] for part in cut], [len(p) for p in cut]


def flex(q, k, start, gamma, tau, least, block, most):
    """Blocks of each query block of one head, and whether it is query-aware; q [N][D], k [M][D] lists of floats."""
    N, M, scale = len(q), len(k), 1 / math.sqrt(len(k[0]))
    lines, blocks, L = -(-N // block), -(-M // block), min(block, N)
    keys, sizes = means(k, block)
    column, slash = dict.fromkeys(range(blocks), 0.0), {}
    for i in range(N - L, N):
        row = softmax([dot(q[i], key) * scale for key in k[: start + i + 1]], [1] * (start + i + 1))
        for j, weight in enumerate(row):
            column[j // block] += weight / L
            # this offset as every row of a query block would meet it
            top = (start + block - 1) // block
            for r in range(block):
                back = top - (start + r - (start + i - j)) // block
                slash[back] = slash.get(back, 0.0) + weight / L / block
    mean = [sum(c) / L for c in zip(*q[N - L :], strict=True)]
    guess = softmax([dot(mean, key) * scale for key in keys], sizes)
    apart = 0.0
    for p, g in zip((column[j] for j in range(blocks)), guess, strict=True):
        for x in (p, g):
            apart += x * math.log(2 * x / (p + g)) / 2 if x > 0 else 0.0
    aware = math.sqrt(max(apart, 0.0)) < tau
    tops = [(start + line * block + block - 1) // block for line in range(lines)]
    ends = [(start + min((line + 1) * block, N) - 1) // block for line in range(lines)]
    if aware:
        pooled, _ = means(q, block)
        rows = []
        for x, e in zip(pooled, ends, strict=True):
            rows.append(softmax([dot(x, key) * scale for key in keys[: e + 1]], sizes[: e + 1]))
        mass = {(line, j): w for line, row in enumerate(rows) for j, w in enumerate(row)}
        taken = fewest(mass, gamma)
    else:
        count = -(-least // block)
        columns, diagonals = fewest(column, gamma, count), fewest(slash, gamma, count)
        mass = {
            (line, j): column[j] + slash.get(tops[line] - j, 0.0)
            for line in range(lines)
            for j in range(ends[line] + 1)
        }
        every = gamma >= 1
        taken = {(n, j) for n, j in mass if j in columns or tops[n] - j in diagonals or every}
    lists = []
    for line in range(lines):
        forced = {0, *range((start + line * block) // block, ends[line] + 1)}
        rest = sorted((j for n, j in taken if n == line and j not in forced), key=lambda j: -mass[line, j])
        limit = max(3, math.ceil(most * blocks))
        lists.append(sorted(sorted(forced) + rest[: limit - len(forced)]))
    return lists, aware


LENGTHS = [(n, n) for n in (1, 7, 15, 16, 17, 64, 65, 129)]


@pytest.mark.parametrize(("N", "M"), [*LENGTHS, (2, 90), (16, 64), (33, 100), (50, 51)])
@pytest.mark.parametrize(("gamma", "tau", "least", "block", "most"), [(0.6, 0.2, 10, 16, 1.0), (0.8, 0.3, 30, 12, 0.5)])
def test_matches_paper_loop(N, M, gamma, tau, least, block, most):
    torch.manual_seed(N + M)
    q, k = torch.randn(2, 4, N, 3, dtype=torch.float64), torch.randn(2, 2, M, 3, dtype=torch.float64)
    # means tell the truth of even heads, and not of peaked ones
    q *= torch.tensor([0.1, 1.0, 6.0, 9.0])[:, None, None]
    v, call = torch.randn(2, 2, M, 5, dtype=torch.float64), Call.of(q, k)
    method = FlexPrefill(gamma, tau, least, block, most)
    pattern = method.select(q, k, call)
    want, kinds = torch.zeros(2, 4, N, M, dtype=torch.bool), set()
    for b in range(2):
        for h in range(4):
            lists, aware = flex(q[b, h].tolist(), k[b, h // 2].tolist(), M - N, gamma, tau, least, block, most)
            kinds.add(aware)
            assert [[j for j in row if j >= 0] for row in pattern.index[b, h].tolist()] == lists
            for line, blocks in enumerate(lists):
                for j in blocks:
                    want[b, h, line * block : (line + 1) * block, j * block : (j + 1) * block] = True
    assert M < 60 or kinds == {True, False}
    want &= Full().mask(call)
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=want, enable_gqa=True)
    torch.testing.assert_close(method.attend(q, k, v, call).o, o, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("N", "M"), [(64, 64), (60, 60), (40, 93), (16, 80)])
def test_diagonals_by_counting_rows(N, M):
    block = 16
    call = Call.of(torch.zeros(1, 1, N, 1), torch.zeros(1, 1, M, 1))
    for offset in (0, 1, 15, 16, 17, 31, M - N):
        mass = torch.zeros(1, 1, M, dtype=torch.float64)
        mass[0, 0, offset] = 1.0
        got = diagonal_sums(mass, call, block)[0, 0]
        want = torch.zeros_like(got)
        first = M - N
        for r in range(block):
            want[(first + block - 1) // block - (first + r - offset) // block] += 1 / block
        torch.testing.assert_close(got, want)


def test_divergence_by_hand():
    # two blocks of two keys; the last queries look at (3/4, 1/4) of them, their means at (1/2, 1/2)
    true = torch.tensor([[[0.75, 0.25]]], dtype=torch.float64)
    q, k = torch.zeros(1, 1, 4, 1, dtype=torch.float64), torch.zeros(1, 1, 4, 1, dtype=torch.float64)
    want = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    want += 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    got = divergence(q, k, true, Call.of(q, k), 2)
    torch.testing.assert_close(got, torch.tensor([[math.sqrt(want / 2)]], dtype=torch.float64))
    assert divergence(q, k, torch.tensor([[[0.5, 0.5]]]).double(), Call.of(q, k), 2) == 0
    # nothing in common is the most there is: the root of log 2
    k[0, 0, :2] = 1000.0
    far = divergence(q + 1, k, torch.tensor([[[0.0, 1.0]]]).double(), Call.of(q, k), 2)
    torch.testing.assert_close(far, torch.tensor([[math.sqrt(math.log(2))]]).double())


def by_blocks(N, block, g, D=64, strength=9.0):
    """A head in which each block of queries looks at three blocks of its own choice."""
    n = N // block
    names = torch.randn(n, D, generator=g).sign()
    k = names.repeat_interleave(block, 0)
    wanted = torch.stack([names[torch.randperm(i + 1, generator=g)[:3]].sum(0) for i in range(n)])
    q = wanted.repeat_interleave(block, 0) * strength / D
    return q + 0.05 * torch.randn(N, D, generator=g), k + 0.05 * torch.randn(N, D, generator=g)


def by_columns(N, g, D=64, strength=9.0):
    """A head in which all queries look at a few keys, and at the key a fixed way back; neighbours of both cancel."""
    codes = torch.randn(N + 2, D, generator=g).sign()
    k = codes[1:-1] - codes[:-2] / 2 - codes[2:] / 2
    q = torch.cat((torch.zeros(333, D), codes[1 : N - 332]))
    for j in (100, 500, 777):
        k[j] = codes[0] * 3.0
        k[j - 1], k[j + 1] = -codes[0] * 1.5, -codes[0] * 1.5
    return (q + codes[0] / 2) * strength / D, k


def heads(N=2048, block=64):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.stack(pair)[None] for pair in zip(by_blocks(N, block, g), by_columns(N, g), strict=True))
    return q, k, Call.of(q, k, scale=1.0)


def kept(method, q, k, call):
    """Attention mass that a method keeps per head, and its density per head, for the later half of the rows."""
    pattern, rows = method.select(q, k, call), slice(1024, None)
    probs = torch.softmax((q @ k.transpose(-1, -2)).masked_fill(~Full().mask(call), -math.inf), -1)
    mask = pattern.mask(call)
    cost = mask.float().sum((0, 2, 3)) / Full().mask(call)[0, 0].sum()
    return (probs * mask)[0, :, rows].sum(-1).mean(-1), cost


def test_tells_the_two_kinds_of_heads_apart():
    q, k, call = heads()
    column, _ = column_and_offset_mass(q, k, call, 64)
    apart = divergence(q, k, block_sums(column, 64) / 64, call, 64)[0]
    assert apart[0] < 0.1 < apart[1]
    method = FlexPrefill(block=64, least=64, most=1.0)
    mass, cost = kept(method, q, k, call)
    assert (mass > 0.85).all(), mass
    assert (cost < torch.tensor([0.2, 0.4])).all(), cost
    # under the other kind: blocks of a query's own are no columns, and means hide columns and diagonals
    as_columns, more = kept(FlexPrefill(block=64, least=64, most=1.0, tau=0.0), q, k, call)
    assert as_columns[0] < 0.4
    assert more[0] > cost[0]
    as_means, more = kept(FlexPrefill(block=64, least=64, tau=1.0), q, k, call)
    assert as_means[1] < 0.5
    assert more[1] > cost[1]


def test_beats_controls_at_equal_cost_over_both_heads():
    q, k, call = heads()
    mass, cost = kept(FlexPrefill(block=64, least=64, most=1.0), q, k, call)
    # a share s of the keys costs about 1-(1-s)^2 of the causal half
    budget = round(2048 * (1 - math.sqrt(1 - float(cost.max()))))
    for other in (Pooled(budget=budget), Random(budget=budget), Streaming(sink=64, recent=budget)):
        other_mass, other_cost = kept(other, q, k, call)
        assert other_cost.mean() > 0.95 * cost.mean(), other
        assert other_mass.mean() < mass.mean() - 0.2, (other, other_mass, mass)


def test_the_budget_adapts_to_head_and_gamma():
    torch.manual_seed(0)
    q, k = torch.ones(1, 2, 1024, 1), torch.randn(1, 2, 1024, 1) * 0.01
    k[0, 0, 320:340] = 99.0
    call = Call.of(q, k)
    for tau in (0.0, 1.0):
        index = FlexPrefill(tau=tau, least=64, block=64, most=1.0).select(q, k, call).index
        peaked, flat = (index[0] >= 0).sum(-1)[:, 8:].float().mean(-1)
        assert flat > 8
        assert peaked < 0.6 * flat
        found = [FlexPrefill(g, tau, 64, 64, 1.0).select(q, k, call).index for g in (0.1, 0.5, 0.9, 0.99, 1.0)]
        counts = [int((index >= 0).sum()) for index in found]
        assert counts == sorted(counts)
        assert counts[-1] == 2 * 16 * 17 / 2


def test_least_and_most():
    q = torch.zeros(1, 1, 1024, 4)
    q[..., 0] = 9.0
    k = torch.zeros(1, 1, 1024, 4)
    k[0, 0, 0, 0] = 99.0  # everything looks at the first key
    call = Call.of(q, k)
    small, wide = (FlexPrefill(tau=0.0, least=n, block=64, most=1.0).select(q, k, call).index for n in (64, 256))
    assert (small >= 0).sum(-1).max() <= 3
    assert (wide >= 0).sum(-1)[0, 0, 15] >= 5
    assert FlexPrefill(least=1024, block=64, most=0.2).select(q, k, call).index.shape == (1, 1, 16, 4)


@pytest.mark.parametrize("N", [1, 100, 333])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_dense_at_full_budget(N, tau):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, N, 8, dtype=torch.float64) * 9 for h in (2, 1, 1))
    call, method = Call.of(q, k), FlexPrefill(1.0, tau, 1, 64, 1.0)
    assert method.select(q, k, call).density(call) == 1.0
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(method.attend(q, k, v, call).o, want, atol=1e-5, rtol=1e-5)


def test_the_estimate_scores_the_last_block_and_the_means():
    call = Call.of(torch.zeros(2, 3, 300, 1), torch.zeros(2, 1, 400, 1))
    assert FlexPrefill().estimate(call) == 6 * (128 * 400 + 4 + 3 * 4)


@pytest.mark.parametrize(
    "args",
    [
        *({"gamma": g} for g in (0.0, 1.5, -1.0, True, "0.9")),
        *({"tau": t} for t in (-0.1, 1.1, None)),
        *({"most": m} for m in (0.0, 2, -0.1)),
        *({name: v} for name in ("least", "block") for v in (0, -8, 2.5)),
    ],
)
def test_refuses(args):
    with pytest.raises(InputError, match="FlexPrefill"):
        FlexPrefill(**args)


def test_refuses_holes_and_looking_ahead():
    q, k = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 2)
    holes = Call.of(q, k, q_pos=torch.tensor([[8, 9]]), k_pos=torch.tensor([[[0, 8, 9]]]))
    for call in (holes, Call.of(q, k, causal=False)):
        with pytest.raises(UnsupportedError, match="FlexPrefill"):
            FlexPrefill().select(q, k, call)
