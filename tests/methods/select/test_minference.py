"""What is true of vertical-slash: the columns and offsets of the last queries, offsets in blocks of 64."""

import math

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Full, Tokens, Union
from saccade.kernels.attend import attend
from saccade.methods.select.minference import MInference, column_and_offset_mass, diagonal_blocks
from saccade.methods.select.pooled import Pooled
from saccade.methods.select.streaming import Streaming

INF = float("inf")


def kept(q, k, columns, diagonals, last=64):
    """Columns and offsets of one head, q [N][D], k [M][D] lists of floats."""
    N, M, D = len(q), len(k), len(k[0])
    column, offset = [0.0] * M, [0.0] * M
    for i in range(max(0, N - last), N):
        p = M - N + i
        w = [math.exp(sum(x * y for x, y in zip(q[i], key, strict=True)) / math.sqrt(D)) for key in k[: p + 1]]
        for j, weight in enumerate(w):
            column[j] += weight / sum(w)
            offset[p - j] += weight / sum(w)
    column[:30] = [INF] * min(30, M)
    offset[:100] = [INF] * min(100, M)
    top = [
        sorted(range(M), key=lambda at, mass=mass: -mass[at])[: max(count, least)]
        for mass, count, least in ((column, columns, 30), (offset, diagonals, 100))
    ]
    return set(top[0]), set(top[1])


def visited(N, M, columns, offsets):
    """Pairs of one head: 64 keys beside each kept offset of a query block, filled up to whole key blocks."""
    mask = torch.zeros(N, M, dtype=torch.bool)
    mask[:, sorted(columns)] = True
    blocks = []
    for a in range(0, N, 64):
        m = M - N + a
        touched = {(m + i - s) // 64 for s in offsets for i in (0, 63)}
        blocks.append({block for block in touched if 0 <= 64 * block < M})
        for block in blocks[-1]:
            mask[a : a + 64, 64 * block : 64 * block + 64] = True
    return mask & torch.ones(N, M, dtype=torch.bool).tril(M - N), blocks


def paper_pairs(N, columns, offsets):
    """Pairs that the paper's unaligned ranges and columns visit."""
    mask = torch.zeros(N, N, dtype=torch.bool)
    mask[:, sorted(columns)] = True
    for m in range(0, N, 64):
        ranges = []
        for s in sorted((s for s in offsets if s < m + 64), reverse=True):
            end = max(m + 64 - s, 64)
            if not ranges or end > ranges[-1][1] + 64:
                ranges.append([end - 64, end])
            elif end > ranges[-1][1]:
                ranges[-1][1] += 64
        for start, end in ranges:
            mask[m : m + 64, start:end] = True
    return mask & torch.ones(N, N, dtype=torch.bool).tril()


LENGTHS = [(n, n) for n in (7, 63, 64, 65, 127, 128, 129, 200, 1000)]


@pytest.mark.parametrize(("N", "M"), [*LENGTHS, (2, 200), (64, 256), (70, 200), (65, 129), (130, 331), (33, 600)])
def test_matches_paper_loop(N, M):
    torch.manual_seed(N + M)
    B, H, G = (1, 2, 1) if M > 500 else (2, 4, 2)
    q, k = torch.randn(B, H, N, 3, dtype=torch.float64) * 2, torch.randn(B, G, M, 3, dtype=torch.float64) * 2
    v, call, method = torch.randn(B, G, M, 5, dtype=torch.float64), Call.of(q, k), MInference(columns=40, diagonals=108)
    pattern = method.select(q, k, call)
    want, most = torch.zeros(B, H, N, M, dtype=torch.bool), 0
    for b in range(B):
        for h in range(H):
            columns, offsets = kept(q[b, h].tolist(), k[b, h * G // H].tolist(), 40, 108)
            want[b, h], blocks = visited(N, M, columns, offsets)
            most = max(most, *map(len, blocks))
            assert set(pattern.parts[1].index[b, h, 0].tolist()) == columns
            found = [{j for j in row if j >= 0} for row in pattern.parts[0].index[b, h].tolist()]
            assert found == blocks
    assert torch.equal(pattern.mask(call), want)
    assert pattern.pairs(call) == want.sum()  # a column inside a block counts once
    # no list is longer than needed, but for an offset that only the first rows are too early for
    assert pattern.parts[0].index.shape[3] <= most + 1
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=want, enable_gqa=True)
    torch.testing.assert_close(method.attend(q, k, v, call).o, o, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("N", "M"), [(7, 7), (65, 65), (200, 200), (70, 201)])
def test_mass_by_column_and_offset(N, M):
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, N, 4, dtype=torch.float64), torch.randn(1, 1, M, 4, dtype=torch.float64)
    column, offset = column_and_offset_mass(q, k, Call.of(q, k), 64)
    L = min(64, N)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(torch.ones(N, M).tril(M - N) == 0, -INF)
    probs = torch.softmax(scores, -1)[:, :, -L:]
    torch.testing.assert_close(column, probs.sum(2))
    want = torch.zeros(1, 2, M, dtype=torch.float64)
    for r in range(L):
        for j in range(M - L + r + 1):
            want[..., M - L + r - j] += probs[:, :, r, j]
    torch.testing.assert_close(offset, want)


def test_conversion_by_hand():
    # 128 rows, offset 0 and column 3: each row block reads its own key block, and the second the column too
    q = torch.zeros(1, 1, 128, 1)
    call = Call.of(q, q)
    blocks = diagonal_blocks(torch.tensor([[[0]]]), call, 64)
    assert blocks.index.tolist() == [[[[0], [1]]]]
    mask = Union((blocks, Tokens(torch.tensor([[[[3]]]]).int()))).mask(call)[0, 0]
    assert mask[:64].equal(torch.ones(64, 128, dtype=torch.bool).tril())
    assert mask[127].nonzero().flatten().tolist() == [3, *range(64, 128)]


def test_conversion_of_an_offset_between_blocks():
    # rows 64..127 at offset 10 need keys 54..117: both blocks; at offset 64 keys 0..63: the first alone
    q = torch.zeros(1, 1, 192, 1)
    index = diagonal_blocks(torch.tensor([[[0, 10]]]), Call.of(q, q), 64).index
    assert index.tolist() == [[[[0, -1], [0, 1], [1, 2]]]]
    index = diagonal_blocks(torch.tensor([[[0, 128]]]), Call.of(q, q), 64).index
    assert index.tolist() == [[[[0, -1], [1, -1], [0, 2]]]]
    # rows 128..191 at offset 127 need keys 1..64, rows 64..127 keys 0 and below
    index = diagonal_blocks(torch.tensor([[[0, 127]]]), Call.of(q, q), 64).index
    assert index.tolist() == [[[[0, -1, -1], [0, 1, -1], [0, 1, 2]]]]


def test_conversion_in_a_chunk():
    # 70 queries at positions 130..199: query block 0 is 130..193, block 1 is 194..199; offset 100 needs 30..93, 94..
    q, k = torch.zeros(1, 1, 70, 1), torch.zeros(1, 1, 200, 1)
    index = diagonal_blocks(torch.tensor([[[0, 100]]]), Call.of(q, k), 64).index
    assert [sorted(j for j in row if j >= 0) for row in index[0, 0].tolist()] == [[0, 1, 2, 3], [1, 2, 3]]
    assert index[0, 0, 1].tolist()[-1] == -1


@pytest.mark.parametrize("args", [{"columns": 2000, "diagonals": 1}, {"columns": 1, "diagonals": 2000}])
@pytest.mark.parametrize("N", [2, 100, 333])
def test_dense_at_full_budget(args, N):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, N, 8), torch.randn(1, 1, N, 8), torch.randn(1, 1, N, 8)
    call = Call.of(q, k)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(MInference(**args).attend(q, k, v, call).o, want, atol=1e-5, rtol=1e-5)
    assert MInference(**args).select(q, k, call).density(call) == 1.0


def test_short_prompts_are_dense_whatever_the_plan():
    for N in (1, 7, 64, 65, 100):
        q = torch.randn(1, 1, N, 4)
        assert MInference(columns=1, diagonals=1).select(q, q, Call.of(q, q)).density(Call.of(q, q)) == 1.0


def test_one_query_is_dense():
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 999, 2)
    assert MInference().select(q, k, Call.of(q, k)) == Full()
    assert MInference().estimate(Call.of(q, k)) == 0.0


def test_the_estimate_scores_the_last_queries():
    for N, M, want in ((300, 300, 64 * 300), (10, 300, 10 * 300), (2, 2, 4)):
        assert MInference().estimate(Call.of(torch.zeros(2, 3, N, 1), torch.zeros(2, 1, M, 1))) == 6 * want


def test_later_tokens_change_outputs_only_through_the_choice():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 512, 8) for _ in range(3))
    call, method = Call.of(q, k), MInference(columns=30, diagonals=100)
    pattern = method.select(q, k, call)
    changed = k.clone()
    changed[:, :, 400:] *= -9.0
    one, two = attend(q, k, v, pattern, call).o, attend(q, changed, v * (changed / k), pattern, call).o
    torch.testing.assert_close(one[:, :, :400], two[:, :, :400])
    assert not torch.allclose(one[:, :, 400:], two[:, :, 400:], atol=0.1)


def test_costs_what_the_paper_costs():
    torch.manual_seed(0)
    N, columns = 2048, set(range(30))
    q = torch.zeros(1, 1, N, 1)
    lone = set(range(100)) | {int(s) for s in torch.randperm(N - 100)[:8] + 100}
    runs = set(range(100)) | {s + i for s in (300, 900, 1500) for i in range(100)}
    # a lone offset needs one block cut to measure or nearly two aligned ones; 100 in a row need 3 or 3 to 4
    for offsets, most in ((lone, 1.5), (runs, 1.2)):
        blocks = diagonal_blocks(torch.tensor([[sorted(offsets)]]), Call.of(q, q), 64)
        pattern = Union((blocks, Tokens(torch.tensor([[[sorted(columns)]]]).int())))
        mask, paper = pattern.mask(Call.of(q, q))[0, 0], paper_pairs(N, columns, offsets)
        for s in offsets:
            assert mask.diagonal(-s).all()
            assert paper.diagonal(-s).all()
        assert mask.sum() < most * paper.sum()


def planted(N, D, seed):
    """One head whose rows look at 20 columns and 3 offsets, and at little else."""
    g = torch.Generator().manual_seed(seed)
    waves = D // 4
    speed = torch.rand(waves, generator=g, dtype=torch.float64) * 2 * math.pi
    at = torch.arange(N, dtype=torch.float64)[:, None] * speed
    offsets = torch.tensor([700, 1111, 1600]).double()
    # q_i . k_j = sum over waves and offsets of cos(speed (i - j - offset)): large where i - j is an offset
    turn = torch.polar(torch.ones(waves, 3, dtype=torch.float64), -speed[:, None] * offsets).sum(-1)
    left = torch.polar(torch.ones_like(at), at) * turn
    right = torch.polar(torch.ones_like(at), at)
    q = torch.cat((left.real, left.imag, torch.ones(N, D // 2)), -1) * 14.0 / waves
    k = torch.cat((right.real, right.imag, torch.zeros(N, D // 2)), -1)
    columns = torch.randperm(N // 2, generator=g)[:20] + 40
    k[columns, D // 2 :] = waves / (D // 2)
    v = torch.randn(N, D, generator=g, dtype=torch.float64)
    return (t.float()[None, None] for t in (q, k, v))


def test_finds_planted_columns_and_diagonals():
    N = 2500
    q, k, v = planted(N, 512, seed=0)
    call = Call.of(q, k, scale=1.0)
    method = MInference(columns=60, diagonals=110)
    cost = method.select(q, k, call).density(call)
    probs = torch.softmax((q @ k.transpose(-1, -2)).masked_fill(~Full().mask(call), -INF), -1)
    dense = probs @ v
    rows = slice(1700, None)  # rows that all offsets reach

    def result(other):
        pattern = other.select(q, k, call)
        error = (other.attend(q, k, v, call).o - dense)[:, :, rows].norm() / dense[:, :, rows].norm()
        return pattern.density(call), (probs * pattern.mask(call))[:, :, rows].sum(-1).mean(), error

    share, mass, error = result(method)
    # a window of w tokens costs about 1-(1-w/N)^2
    near = Streaming(sink=64, recent=round(N * (1 - math.sqrt(1 - cost))))
    others = [result(near), result(Pooled(budget=round(N * (1 - math.sqrt(1 - cost)))))]
    assert share < 0.5
    assert mass > 0.9
    for other_share, other_mass, other_error in others:
        assert other_share > 0.97 * share
        assert other_mass < mass
        assert error < other_error / 10, (error, other_error)


@pytest.mark.parametrize(
    "args", [{"columns": 0}, {"columns": -5}, {"diagonals": 0}, {"last": 0}, {"block": -64}, {"diagonals": 10.0}]
)
def test_refuses(args):
    with pytest.raises(InputError, match="MInference"):
        MInference(**args)


def test_refuses_holes_and_looking_ahead():
    q, k = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 2)
    holes = Call.of(q, k, q_pos=torch.tensor([[8, 9]]), k_pos=torch.tensor([[[0, 8, 9]]]))
    for call in (holes, Call.of(q, k, causal=False)):
        with pytest.raises(UnsupportedError, match="MInference"):
            MInference().select(q, k, call)
