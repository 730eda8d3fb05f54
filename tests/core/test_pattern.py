"""Patterns: the laws, for random ones of every kind, in calls of every kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Blocks, Full, PerHead, Tokens, Union, Window, per_head


def rows_of(rng, shape, count, high):
    """Index rows: distinct, ascending, some of them empty (-1, last)."""
    if high == 0:
        return torch.full((*shape, count), -1, dtype=torch.int32)
    index = torch.rand(*shape, high, generator=rng).argsort(-1)[..., :count].sort(-1).values
    index = torch.nn.functional.pad(index, (0, count - index.shape[-1]), value=-1)
    keep = torch.randint(0, count + 1, (*shape, 1), generator=rng)
    return index.masked_fill(torch.arange(count) >= keep, -1).int()


def draw_pattern(draw, rng, B, H, G, N, M, depth=0):
    """A random pattern for a call of these sizes."""
    kinds = ["full", "window", "window_per_head", "blocks", "tokens", "shared_tokens"]
    kind = draw(st.sampled_from(kinds + ["union", "union"] * (depth < 2) + ["per_head"] * (depth < 2 and H > 1)))
    rows, heads = draw(st.sampled_from([1, B])), draw(st.sampled_from([1, G, H]))
    if kind == "full":
        return Full()
    if kind == "window":
        return Window(draw(st.integers(0, M + 2)), draw(st.integers(1, M + 2)))
    if kind == "window_per_head":
        sink = torch.randint(0, M + 2, (H,), generator=rng)
        return Window(sink, torch.randint(1, M + 2, (H,), generator=rng))
    if kind == "blocks":
        block_q, block_k = draw(st.sampled_from([1, 3, 4, 8])), draw(st.sampled_from([1, 2, 5, 8]))
        shape = (rows, heads, -(-N // block_q))
        return Blocks(rows_of(rng, shape, draw(st.integers(1, 4)), -(-M // block_k)), block_q, block_k)
    if kind == "tokens":
        return Tokens(rows_of(rng, (rows, heads, N), draw(st.integers(1, 6)), M))
    if kind == "shared_tokens":
        return Tokens(rows_of(rng, (rows, heads, 1), draw(st.integers(1, 6)), M))
    if kind == "union":
        return Union(
            tuple(draw_pattern(draw, rng, B, H, G, N, M, depth + 1) for _ in range(draw(st.sampled_from([2, 2, 3]))))
        )
    at = draw(st.integers(1, H - 1))
    ids = draw(st.permutations(range(H)))
    # parts of their own: a kv head for each query head, as a choice of heads need not be a rectangle
    parts = [ids[:at], ids[at:]]
    return PerHead(tuple((tuple(p), draw_pattern(draw, rng, B, len(p), len(p), N, M, depth + 1)) for p in parts))


@st.composite
def cases(draw, contiguous=None):
    """A call and a pattern for it."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    B, (H, G) = draw(st.sampled_from([1, 2])), draw(st.sampled_from([(4, 2), (4, 4), (4, 1)]))
    M = draw(st.integers(1, 21))
    N = draw(st.integers(1, M))
    q, k = torch.randn(B, H, N, 4, generator=rng), torch.randn(B, G, M, 4, generator=rng)
    fields = dict(causal=draw(st.booleans()))
    if not (draw(st.booleans()) if contiguous is None else contiguous):
        k_pos = torch.rand(draw(st.sampled_from([1, B])), draw(st.sampled_from([1, G])), 2 * M + 3, generator=rng)
        k_pos = k_pos.argsort(-1)[..., :M].sort(-1).values
        k_pos[torch.rand(k_pos.shape, generator=rng) < 0.15] = -1
        q_pos = torch.randint(-1, 2 * M + 3, (draw(st.sampled_from([1, B])), N), generator=rng)
        fields |= dict(q_pos=q_pos, k_pos=k_pos)
    return Call.of(q, k, **fields), draw_pattern(draw, rng, B, H, G, N, M)


def slow_mask(pattern, call):
    """The mask pair by pair, from the definitions."""
    B, H, G, N, M = call.shape
    q_pos, k_pos = call.positions()
    q_pos, k_pos = q_pos.expand(B, -1).tolist(), k_pos.expand(B, G, -1).tolist()

    def at(t, b, h):
        t = t.expand(B, *t.shape[1:])[b]
        return t[0 if len(t) == 1 else h if len(t) == H else h * G // H]

    def chosen(pattern, b, h, i, j, H, local):
        p, s = q_pos[b][i], k_pos[b][h * G // call.shape.H][j]
        if isinstance(pattern, Full):
            return True
        if isinstance(pattern, Window):
            sink, recent = (int(x[local]) if isinstance(x, torch.Tensor) else x for x in (pattern.sink, pattern.recent))
            return s < sink or abs(p - s) < recent
        if isinstance(pattern, Union):
            return any(chosen(part, b, h, i, j, H, local) for part in pattern.parts)
        if isinstance(pattern, PerHead):
            for heads, part in pattern.parts:
                if local in heads:
                    return chosen(part, b, h, i, j, len(heads), heads.index(local))
        index = pattern.index[min(b, len(pattern.index) - 1)]
        count = len(index)
        row = index[0 if count == 1 else local if count == H else local * count // H]
        if isinstance(pattern, Blocks):
            return j // pattern.block_k in row[i // pattern.block_q].tolist()
        return j in row[0 if len(row) == 1 else i].tolist()

    out = torch.zeros(B, H, N, M, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                for j in range(M):
                    p, s = q_pos[b][i], k_pos[b][h * G // H][j]
                    legal = p >= 0 and s >= 0 and (s <= p or not call.causal)
                    out[b, h, i, j] = legal and chosen(pattern, b, h, i, j, H, h)
    return out


@settings(max_examples=150, deadline=None)
@given(cases())
def test_pairs_are_counted_as_the_mask_counts_them(case):
    call, pattern = case
    assert pattern.pairs(call) == pattern.mask(call).sum().item()
    allowed = Full().mask(call).sum().item()
    assert pattern.density(call) == pytest.approx(pattern.mask(call).sum().item() / max(allowed, 1))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_pairs_of_each_head_are_counted_as_the_mask_counts_them(case):
    call, pattern = case
    found = pattern.counts(call)
    assert found.dtype == torch.double and found.shape == (call.shape.H,)
    assert found.tolist() == pattern.mask(call).sum((0, 2, 3)).tolist()


@settings(max_examples=80, deadline=None)
@given(cases())
def test_mask_is_what_the_definitions_say(case):
    call, pattern = case
    assert torch.equal(pattern.mask(call), slow_mask(pattern, call))


@settings(max_examples=80, deadline=None)
@given(cases(), st.data())
def test_rows_of_a_mask(case, data):
    call, pattern = case
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, call.shape.N - 1), min_size=1))))
    assert torch.equal(pattern.mask(call, rows), pattern.mask(call)[:, :, rows])


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_heads_are_a_slice(case, data):
    call, pattern = case
    share = call.shape.H // call.shape.G
    groups = data.draw(st.lists(st.integers(0, call.shape.G - 1), min_size=1, unique=True))
    heads = tuple(g * share + i for g in groups for i in range(share))
    sub = call.take(heads, tuple(groups))
    assert torch.equal(pattern.heads(heads, call).mask(sub), pattern.mask(call)[:, list(heads)])


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_any_choice_of_heads_is_a_slice(case, data):
    call, pattern = case
    share = call.shape.H // call.shape.G
    heads = tuple(data.draw(st.lists(st.integers(0, call.shape.H - 1), min_size=1, unique=True)))
    sub = call.take(heads, tuple(h // share for h in heads))
    assert torch.equal(pattern.heads(heads, call).mask(sub), pattern.mask(call)[:, list(heads)])


def test_an_index_per_kv_head_is_cut_with_its_call():
    call = Call.of(torch.zeros(1, 4, 2, 4), torch.zeros(1, 2, 6, 4))
    pattern = Tokens(torch.tensor([0, 3]).view(1, 2, 1, 1).int())
    assert pattern.heads((2, 0), call).index.flatten().tolist() == [3, 0]
    with pytest.raises(InputError, match="give its call"):
        pattern.heads((2, 3))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([4, 8]), st.sampled_from([4, 16]), st.booleans())
def test_block_mask_and_back(seed, block_q, block_k, causal):
    rng = torch.Generator().manual_seed(seed)
    N, M = 32, 64
    q, k = torch.zeros(2, 4, N, 8), torch.zeros(2, 2, M, 8)
    call = Call.of(q, k, causal=causal)
    pattern = Blocks(rows_of(rng, (2, 4, N // block_q), 3, M // block_k), block_q, block_k)
    exchanged = pattern.to_block_mask(call)
    assert exchanged.shape == (2, 4, N, M)
    back = Blocks.from_block_mask(exchanged)
    assert (back.block_q, back.block_k) == (block_q, block_k)
    assert torch.equal(back.mask(call), pattern.mask(call))


def test_only_blocks_at_an_edge_ask_the_mask_function():
    q = torch.zeros(1, 1, 64, 8)
    call = Call.of(q, q)
    index = torch.tensor([[0, -1, -1], [0, 1, -1], [1, -1, 2], [3, 0, 2]]).view(1, 1, 4, 3).int()
    mask = Blocks(index, 16, 16).to_block_mask(call)
    assert mask.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1]
    assert mask.kv_indices[0, 0, :, 0].tolist() == [0, 1, 2, 3]
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 1, 2]
    assert mask.full_kv_indices[0, 0, 3, :2].tolist() == [0, 2]


def test_block_mask_agrees_with_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask

    q = torch.zeros(1, 2, 64, 8)
    call = Call.of(q, q)
    made = create_block_mask(lambda b, h, i, j: i >= j, 1, 2, 64, 64, BLOCK_SIZE=16, device="cpu")
    assert torch.equal(Blocks.from_block_mask(made).mask(call), Full().mask(call))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_draw_is_a_picture(case):
    call, pattern = case
    size = min(48, call.shape.N, call.shape.M)
    picture = pattern.draw(call)
    assert picture.shape == (call.shape.H, size, size)
    assert ((picture >= 0) & (picture <= 1)).all()


def test_draw_by_hand():
    q = torch.zeros(1, 1, 4, 2)
    assert Window(1, 1).draw(Call.of(q, q), 2)[0].tolist() == [[0.75, 0.0], [0.5, 0.5]]


def test_density_by_hand():
    q = torch.zeros(1, 1, 4, 2)
    assert Window(1, 1).density(Call.of(q, q)) == 0.7
    assert Full().pairs(Call.of(q, q, causal=False)) == 16


def test_per_head():
    call = Call.of(torch.zeros(1, 4, 1, 2), torch.zeros(1, 2, 1, 2))
    assert per_head(torch.tensor([[5, 6]]), call).tolist() == [[5, 5, 6, 6]]
    assert per_head(torch.zeros(1, 1), call).shape == (1, 1)
    with pytest.raises(InputError, match="3 fits neither 1, 2 kv heads nor 4 query heads"):
        per_head(torch.zeros(1, 3), call)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Window(-1, 4),
        lambda: Window(0, 0),
        lambda: Window(torch.zeros(1, 2), 4),
        lambda: Blocks(torch.zeros(1, 2, 3), 4, 4),
        lambda: Blocks(torch.zeros(1, 1, 1, 1), 0, 4),
        lambda: Tokens(torch.zeros(1, 2, 3)),
        lambda: PerHead((((0,), Full()), ((0,), Full()))),
        lambda: PerHead((((1,), Full()),)),
    ],
)
def test_patterns_that_mean_nothing(make):
    with pytest.raises(InputError):
        make()
