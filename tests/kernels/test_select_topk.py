"""The largest entries of rows and the tiled choice of pooled blocks, in PyTorch and as kernels, against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.call import Call
from saccade.kernels import topk
from saccade.kernels.scores import pool, pooled_scores
from saccade.kernels.topk import largest, top_blocks, top_pooled

triton_topk = pytest.importorskip("saccade.kernels.select.triton_topk", reason="Triton is not installed")
NEG, POS = float("-inf"), float("inf")


def best_of(row, count):
    """Indices of the largest, the lowest index first where values tie, ascending, filled up with -1."""
    order = sorted((j for j in range(len(row)) if row[j] > NEG), key=lambda j: (-row[j], j))[:count]
    return sorted(order) + [-1] * (min(count, len(row)) - len(order))


def awkward(rng, *shape, dtype=torch.float32):
    """Scores with many ties, both infinities, both zeros, and large and tiny numbers."""
    scores = torch.randn(shape, generator=rng).mul(2).round()
    kind = torch.randint(0, 12, shape, generator=rng)
    for at, value in enumerate((NEG, POS, -0.0, 1e-30, -1e-30, 6e4)):
        scores = torch.where(kind == at, value, scores)
    return scores.to(dtype)


def call_of(B, H, N, M, causal=True):
    return Call.of(torch.zeros(B, H, N, 1), torch.zeros(B, 1, M, 1), causal=causal)


@settings(max_examples=16, deadline=None)
@given(st.integers(1, 150), st.integers(1, 160), st.sampled_from([torch.float32, torch.float16]), st.integers(0, 9))
def test_largest_matches_the_loop(m, count, dtype, seed):
    scores = awkward(torch.Generator().manual_seed(seed), 1, 2, m, dtype=dtype)
    want = [[best_of(row, count) for row in scores[0].tolist()]]
    assert largest(scores, count).tolist() == want
    assert triton_topk.largest(scores, count).tolist() == want
    # rows that are not contiguous
    wide = awkward(torch.Generator().manual_seed(seed), 1, 2, 2 * m, dtype=dtype)[..., ::2]
    assert triton_topk.largest(wide, count).tolist() == largest(wide, count).tolist()


@pytest.mark.parametrize(("m", "count"), [(65, 1), (65, 8), (200, 8), (333, 20), (330, 32)])
def test_long_rows_go_in_pieces(monkeypatch, m, count):
    monkeypatch.setattr(triton_topk, "LONGEST", 64)
    monkeypatch.setattr(triton_topk, "SHORTEST", 16)
    scores = awkward(torch.Generator().manual_seed(m), 2, 2, m)
    want = [[best_of(row, count) for row in head] for head in scores.tolist()]
    assert triton_topk.largest(scores, count).tolist() == want
    assert triton_topk.largest(scores, 33) is None  # a piece would have to hold more than a row may


def test_rows_beyond_reach_fall_to_pytorch(monkeypatch):
    monkeypatch.setattr(triton_topk, "LONGEST", 8)
    assert triton_topk.top_lines(torch.zeros(1, 1, 1, 9), 2, 1, 1, call_of(1, 1, 1, 9)) is None


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(0, 50),
    st.sampled_from([1, 4, 7, 16]),
    st.sampled_from([1, 3, 8, 16]),
    st.integers(1, 20),
    st.booleans(),
)
def test_lines_match_the_loop(N, past, block_q, block_k, count, causal):
    M, call = N + past, call_of(1, 2, N, N + past, causal)
    nq, nk = -(-N // block_q), -(-M // block_k)
    scores = awkward(torch.Generator().manual_seed(N * 31 + past), 1, 2, nq, nk)
    kernel = triton_topk.top_lines(scores, count, block_q, block_k, call).tolist()
    assert top_blocks(scores, count, block_q, block_k, call).index.tolist() == kernel
    for h in range(2):
        for i in range(nq):
            last = past + min(N, (i + 1) * block_q) - 1
            row = [s if not causal or j * block_k <= last else NEG for j, s in enumerate(scores[0, h, i].tolist())]
            assert kernel[0][h][i] == best_of(row, count)


def test_lines_of_a_tile_are_lines_of_the_whole():
    call, scores = call_of(1, 2, 100, 130), torch.randn(1, 2, 13, 17)
    whole = triton_topk.top_lines(scores, 5, 8, 8, call)
    for a in (3, 8, 12):
        # causality hides what is cut off
        seen = -(-(min(8 * (a + 1), 100) + 30) // 8)
        part = triton_topk.top_lines(scores[:, :, a : a + 1, :seen], 5, 8, 8, call, first=a)
        assert torch.equal(part, whole[:, :, a : a + 1])


def in_tiles(q, k, count, block_q, block_k, call, sink, forced, rows):
    """What `top_pooled` does on a GPU, by the interpreter: products and choice, some rows at a time."""
    mean_q, mean_k = pool(q, block_q), pool(k, block_k)
    B, H, nq, _ = mean_q.shape
    parts = []
    for a in range(0, nq, rows):
        n = min(rows, nq - a)
        scores = torch.full((B, H, n, mean_k.shape[2]), float("nan"))
        triton_topk.products(mean_q[:, :, a : a + n], mean_k, scores, a, block_q, block_k, call, sink, forced)
        parts.append(triton_topk.top_lines(scores, count, block_q, block_k, call, a))
    return torch.cat(parts, 2)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(0, 60),
    st.sampled_from([(8, 8), (16, 4), (4, 16)]),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 2),
)
def test_tiles_choose_what_the_whole_would(N, past, blocks, count, causal, sink):
    rng = torch.Generator().manual_seed(N * 91 + past)
    q, k = torch.randn(1, 4, N, 5, generator=rng), torch.randn(1, 2, N + past, 5, generator=rng)
    call, (block_q, block_k) = Call.of(q, k, causal=causal), blocks
    nq = -(-N // block_q)
    own = (torch.arange(nq) * block_q + past).int() // block_k
    for forced in (None, (own, own + 2)) if causal else (None,):
        scores = pooled_scores(q.double(), k.double(), block_q, block_k).float()
        at = torch.arange(scores.shape[3])
        must = at < sink
        if forced is not None:
            must = must | ((at >= own[:, None]) & (at < own[:, None] + 2))
        want = top_blocks(scores.masked_fill(must, POS), count, block_q, block_k, call)
        got = top_pooled(q, k, count, block_q, block_k, call, sink, forced)
        assert (got.block_q, got.block_k) == blocks
        ranks(got.index, scores.masked_fill(must, POS), want.index)
        kernel = in_tiles(q, k, count, block_q, block_k, call, sink, forced, rows=max(1, nq // 2))
        ranks(kernel, scores.masked_fill(must, POS), want.index)


def test_products_of_many_tiles():
    # tiles of rows that start in the middle, and more columns than one tile: whatever a row sees is there
    q, k = torch.randn(1, 1, 90, 3), torch.randn(1, 1, 150, 3)
    call, first = Call.of(torch.zeros(1, 1, 150, 1), torch.zeros(1, 1, 150, 1)), 60
    out = torch.full((1, 1, 90, 150), float("nan"))
    triton_topk.products(q, k, out, first, 1, 1, call)
    seen = torch.ones(150, 150, dtype=torch.bool).tril()[first:]
    torch.testing.assert_close(out[0, 0][seen], (q @ k.mT)[0, 0][seen])
    assert out[0, 0, :4].isnan().any()  # what causality hides whole was not formed


def ranks(index, scores, want):
    """Equal, or different only where scores are as good as equal."""
    assert torch.equal(index < 0, want < 0)
    chosen, wanted = (scores.gather(3, i.clamp_min(0).long()).masked_fill(i < 0, NEG) for i in (index, want))
    torch.testing.assert_close(chosen.sort(-1).values, wanted.sort(-1).values, atol=1e-5, rtol=1e-5)
    assert ((index.diff(dim=-1) > 0) | (index[..., 1:] < 0)).all()


def test_tiles_are_as_small_as_the_scratch(monkeypatch):
    q, k = torch.randn(1, 4, 200, 8), torch.randn(1, 2, 230, 8)
    call = Call.of(q, k)
    whole = top_pooled(q, k, 3, 16, 16, call).index
    held = []

    def products(q, k, *rest):
        held.append(q.shape[1] * q.shape[2] * k.shape[2])
        return real(q, k, *rest)

    real = topk.products
    monkeypatch.setattr(topk, "products", products)
    monkeypatch.setattr(topk, "SCRATCH", 150)
    assert torch.equal(top_pooled(q, k, 3, 16, 16, call).index, whole)
    assert max(held) <= 150 and len(held) == 7


def test_ties_go_to_the_lowest_index():
    scores = torch.zeros(1, 1, 3, 3)
    call = call_of(1, 1, 3, 3)
    assert top_blocks(scores, 2, 1, 1, call).index.tolist() == [[[[0, -1], [0, 1], [0, 1]]]]
    assert triton_topk.top_lines(scores, 2, 1, 1, call).tolist() == [[[[0, -1], [0, 1], [0, 1]]]]
    more = torch.tensor([[[1.0, 2.0, 1.0, -0.0, 0.0, 1.0]]])
    for pick in (largest, triton_topk.largest):
        assert pick(more, 3).tolist() == [[[0, 1, 2]]]
        assert pick(more, 5).tolist() == [[[0, 1, 2, 3, 5]]]
