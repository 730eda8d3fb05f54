"""attend by Triton: the lists of a pattern, the kernel for rows of queries, and what it refuses, in the interpreter."""

import os
import random
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.call import Call, Shape
from saccade.core.errors import UnsupportedError
from saccade.core.pattern import Blocks, Full, Pattern, PerHead, Tokens, Union, Window, per_head
from saccade.kernels.attend import attend, reference

pytest.importorskip("triton", reason="Triton is not installed")
from saccade.kernels.attend import lower as lists
from saccade.kernels.attend import triton_prefill

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tensors here are on the CPU")
B, H, G = 2, 4, 2


def index(rng, rows, heads, lines, count, high):
    """Distinct numbers per line in no order, some lines short, some empty."""
    found = torch.rand(rows, heads, lines, high, generator=rng).argsort(-1)[..., :count]
    found = torch.nn.functional.pad(found, (0, count - found.shape[-1]), value=-1)
    keep = torch.randint(0, count + 1, (rows, heads, lines, 1), generator=rng)
    return found.masked_fill(torch.arange(count) >= keep, -1).int()


def pattern(kind, N, M, rng):
    """A pattern for B, H, G above."""

    def blocks(rows, heads, block_q, block_k, count):
        lines, high = -(-N // block_q), -(-M // block_k)
        return Blocks(index(rng, rows, heads, lines, count, high), block_q, block_k)

    simple = {
        "full": lambda: Full(),
        "window": lambda: Window(3, 9),
        "wide window": lambda: Window(M // 3, M // 2 + 1),
        "window per head": lambda: Window(torch.tensor([0, 3, 3, 70]), torch.tensor([1, 9, 9, 33])),
        "blocks": lambda: blocks(B, H, 16, 16, 3),
        "blocks of a kv head": lambda: blocks(1, G, 32, 32, 2),
        "blocks for all": lambda: blocks(1, 1, 16, 64, 2),
        "odd blocks": lambda: blocks(1, G, 24, 7, 5),
        "columns": lambda: Tokens(index(rng, B, G, 1, 20, M)),
        "tokens": lambda: Tokens(index(rng, 1, G, N, 5, M)),
    }
    if " + " in kind:
        return Union(tuple(pattern(part, N, M, rng) for part in kind.split(" + ")))
    if kind != "per head":
        return simple[kind]()
    return PerHead(
        (
            ((2, 0), Union((Window(2, 5), Tokens(index(rng, B, 2, 1, 4, M))))),
            ((3,), Full()),
            ((1,), Blocks(index(rng, B, 1, -(-N // 16), 2, -(-M // 32)), 16, 32)),
        )
    )


SIMPLE = [
    *("full", "window", "wide window", "window per head", "blocks", "blocks of a kv head", "blocks for all"),
    *("odd blocks", "columns", "per head"),
]
UNIONS = [
    *("blocks + columns", "wide window + blocks", "window per head + columns + blocks of a kv head"),
    *("blocks of a kv head + odd blocks", "per head + columns", "blocks + per head + window"),
]
CALLS = ["causal", "scaled", "negative", "not causal", "holes", "padded"]


def make_call(kind, q, k, rng):
    N, M = q.shape[2], k.shape[2]
    if kind == "padded":
        # row 1 is shorter than row 0, its padding is on the left
        k_pos = torch.stack((torch.arange(M), torch.arange(M) - M // 3)).clamp_min(-1)[:, None]
        return Call.of(q, k, q_pos=k_pos[:, 0, M - N :], k_pos=k_pos)
    if kind == "holes":
        k_pos = torch.rand(B, G, 2 * M, generator=rng).argsort(-1)[..., :M].sort(-1).values
        k_pos[torch.rand(k_pos.shape, generator=rng) < 0.1] = -1
        q_pos = torch.arange(2 * M - N, 2 * M).repeat(B, 1)
        q_pos[torch.rand(q_pos.shape, generator=rng) < 0.1] = -1
        return Call.of(q, k, q_pos=q_pos, k_pos=k_pos, causal=bool(torch.rand((), generator=rng) < 0.7))
    scale = {"scaled": 0.7, "negative": -0.3}.get(kind)
    return Call.of(q, k, causal=kind != "not causal", scale=scale)


def make(N, M, D, Dv, rng, dtype=torch.float32):
    """q, and k and v as views of a store with room behind its tokens."""
    q = torch.randn(B, N, H, D, generator=rng).transpose(1, 2).to(dtype)
    k, v = (torch.randn(B, G, M + 5, d, generator=rng).to(dtype)[:, :, :M] for d in (D, Dv))
    return q, k, v


def agree(q, k, v, shown, call, bias=None, tile=None):
    """Output and log-sum-exp equal the reference in float64."""
    wide = [t.double() for t in (q, k, v)]
    want = reference.attend(*wide, shown, call, None if bias is None else bias.double())
    lowered = lists.lower(shown, call, q.device)
    got = triton_prefill.launch(q, k, v, lowered, call, bias, True, tile)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3}[q.dtype]
    torch.testing.assert_close(got.o.double(), want.o, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.lse.double(), want.lse, atol=tolerance, rtol=tolerance)
    return got


SMALL = triton_prefill.Tile(16, 16, 4, 2)  # so that few tokens make many tiles


@interpreted
@settings(max_examples=14, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(SIMPLE + UNIONS),
    call_kind=st.sampled_from(CALLS),
    N=st.integers(1, 50),
    past=st.sampled_from([0, 0, 1, 30]),
    widths=st.sampled_from([(8, 8), (8, 16), (5, 7)]),
    biased=st.sampled_from([None, (B, G), (1, H), (1, 1)]),
    seed=st.integers(0, 99),
)
def test_any_mixture_equals_the_reference(kind, call_kind, N, past, widths, biased, seed):
    rng = torch.Generator().manual_seed(seed)
    M = N + past
    q, k, v = make(N, M, *widths, rng)
    bias = None if biased is None else torch.randn(*biased, M, generator=rng)
    agree(q, k, v, pattern(kind, N, M, rng), make_call(call_kind, q, k, rng), bias, SMALL)


@interpreted
@pytest.mark.parametrize(
    ("kind", "N", "M"), [("per head + columns", 33, 70), ("window per head + columns + blocks of a kv head", 50, 65)]
)
@pytest.mark.parametrize("call_kind", ["not causal", "holes"])
def test_mixtures_of_everything(kind, N, M, call_kind):
    rng = torch.Generator().manual_seed(N)
    q, k, v = make(N, M, 8, 8, rng)
    agree(q, k, v, pattern(kind, N, M, rng), make_call(call_kind, q, k, rng), None, SMALL)


@interpreted
@pytest.mark.parametrize(("N", "M"), [(1, 1), (63, 63), (64, 64), (65, 65), (127, 127), (129, 129), (5, 1000)])
def test_lengths_around_the_edges_of_tiles(N, M):
    rng = torch.Generator().manual_seed(N)
    q, k, v = make(N, M, 16, 16, rng)
    shown = Union((Window(10, 40), Blocks(index(rng, 1, 1, -(-N // 64), 4, -(-M // 64)), 64, 64)))
    agree(q, k, v, shown, Call.of(q, k))


@interpreted
@pytest.mark.parametrize(("D", "Dv"), [(64, 64), (80, 40), (96, 96), (128, 64), (256, 256), (33, 1)])
def test_widths_of_heads_in_half_precision(D, Dv):
    rng = torch.Generator().manual_seed(D)
    q, k, v = make(40, 77, D, Dv, rng, torch.float16)
    agree(q, k, v, pattern("blocks of a kv head", 40, 77, rng), Call.of(q, k))


@interpreted
def test_each_query_its_own_tokens():
    rng = torch.Generator().manual_seed(0)
    q, k, v = make(5, 30, 8, 8, rng)
    for kind in ("tokens", "window + tokens + odd blocks"):
        agree(q, k, v, pattern(kind, 5, 30, rng), Call.of(q, k), None, SMALL)


@interpreted
def test_a_mixture_of_heads_is_one_launch(monkeypatch):
    launches = []
    kernel = triton_prefill._forward

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_prefill, "_forward", Counted())
    rng = torch.Generator().manual_seed(1)
    q, k, v = make(40, 40, 8, 8, rng)
    shown, call = pattern("per head", 40, 40, rng), Call.of(q, k)
    got = attend(q, k, v, shown, call, impl="triton")
    assert launches == [(-(-40 // 16) * B * H,)]
    torch.testing.assert_close(got.o, reference.attend(q, k, v, shown, call, None).o, atol=1e-5, rtol=1e-5)


def test_heads_of_a_key_head_share_a_tile_where_they_share_their_lists():
    assert triton_prefill.cut(128, 128, 4) == (128, 1)
    assert triton_prefill.cut(64, 128, 4) == (64, 2)
    assert triton_prefill.cut(16, 128, 4) == (16, 4)
    assert triton_prefill.cut(1, 128, 4) == (4, 4)
    assert triton_prefill.cut(1, 128, 3) == (16, 1)
    assert triton_prefill.cut(192, 128, 1) == (64, 1)
    assert triton_prefill.cut(24, 128, 2) == (32, 2)


@interpreted
def test_a_row_without_keys_gives_zero():
    rng = torch.Generator().manual_seed(2)
    q, k, v = make(20, 40, 8, 8, rng)
    nothing = torch.full((1, 1, 1, 1), -1).int()
    unreal = Call.of(q, k, q_pos=torch.full((1, 20), -1), k_pos=torch.arange(40)[None, None])
    empty = Call.of(q, k, q_pos=torch.arange(20)[None], k_pos=torch.full((1, 1, 40), -1))
    late = Tokens(torch.tensor([30, 39]).view(1, 1, 1, 2).int())
    for shown, call, rows in [
        (Tokens(nothing), None, slice(0, 20)),
        (Blocks(nothing.expand(1, 1, 2, 1), 16, 16), None, slice(0, 20)),
        (Union((Blocks(nothing.expand(1, 1, 2, 1), 16, 16), late)), None, slice(0, 10)),
        (Full(), unreal, slice(0, 20)),
        (Union((Window(3, 5), late)), empty, slice(0, 20)),
    ]:
        call = Call.of(q, k) if call is None else call
        got = agree(q, k, v, shown, call, None, SMALL)
        assert not got.o[:, :, rows].any() and got.lse[:, :, rows].isneginf().all()
        assert got.o[:, :, rows.stop :].any() == (rows.stop < 20)


@interpreted
def test_without_lse_and_through_the_door():
    rng = torch.Generator().manual_seed(3)
    q, k, v = make(30, 30, 8, 8, rng)
    out = attend(q, k, v, Window(2, 7), impl="triton", lse=False)
    assert out.lse is None
    torch.testing.assert_close(out.o, attend(q, k, v, Window(2, 7), impl="reference").o, atol=1e-5, rtol=1e-5)


@interpreted
def test_what_is_not_served_is_refused_in_words(monkeypatch):
    q, k, v = make(20, 20, 8, 8, torch.Generator().manual_seed(4))
    with pytest.raises(UnsupportedError, match="float64"):
        attend(q.double(), k.double(), v.double(), impl="triton")
    with pytest.raises(UnsupportedError, match="300 wide"):
        attend(*(t.repeat(1, 1, 1, 38)[..., :300] for t in (q, k, v)), impl="triton")
    leaf = q.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="Tokens"):
        attend(leaf, k, v, Tokens(torch.zeros(1, 1, 1, 1).int()), impl="triton")

    class Even(Pattern):
        """Even slots."""

        def member(self, call, rows, slots):
            return slots % 2 == 0

    for shown in (Even(), Union((Full(), Even())), PerHead((((0, 1), Even()), ((2, 3), Full())))):
        with pytest.raises(UnsupportedError, match="Even has no lists"):
            attend(q, k, v, shown, impl="triton")
        with pytest.raises(UnsupportedError, match="Even has no lists"):
            lists.lower(Union((Window(1, 1), Even())), Call.of(q, k), "cpu")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UnsupportedError, match="cpu"):
        attend(q, k, v, impl="triton")


# lists


def mask_of(lowered, call):
    """The pairs [B,H,N,M] of lowered lists, slot by slot."""
    _, _, _, N, M = call.shape
    q_pos, k_pos = call.positions()
    share = H // lowered.lists
    line = torch.arange(N) // lowered.block_q
    p, j = q_pos[:, None, :, None], per_head(k_pos, call)[:, :, None, :]
    sink, recent = (t.repeat_interleave(share)[None, :, None, None] for t in (lowered.sink, lowered.recent))
    shown = ((j < sink) | ((p - j).abs() < recent)).expand(B, H, N, M).clone()
    assert lowered.windows or not shown.any()
    slots = torch.arange(M)
    if lowered.index is not None:
        assert ((lowered.index >= 0).sum(-1) == lowered.count).all()
        blocks = lowered.index.expand(B, -1, -1, -1).repeat_interleave(share, 1)[:, :, line]
        shown |= (blocks[..., None] == slots // lowered.block_k).any(3)
    if lowered.tokens is not None:
        tokens = lowered.tokens.expand(B, -1, -1, -1).repeat_interleave(share, 1)
        tokens = tokens[:, :, line] if tokens.shape[2] > 1 else tokens.expand(-1, -1, N, -1)
        mine = (tokens[..., None] == slots).any(3)
        if lowered.index is not None:
            assert not (mine & (blocks[..., None] == slots // lowered.block_k).any(3)).any()
        shown |= mine
    for rows in (lowered.index, lowered.tokens):
        if rows is not None:
            assert ((rows[..., 1:] > rows[..., :-1]) | (rows[..., 1:] < 0)).all()
            assert (rows[..., 1:] < 0)[rows[..., :-1] < 0].all()
    return shown & call.sees(p, j)


@pytest.mark.parametrize("kind", [*SIMPLE, *UNIONS, "tokens", "tokens + odd blocks + window", "per head + tokens"])
def test_lists_hold_the_pairs_of_the_pattern(kind):
    for N, M, causal in [(1, 1, True), (17, 40, False), (65, 100, True)]:
        rng = torch.Generator().manual_seed(N)
        call = Call(Shape(B, H, G, N, M), causal=causal)
        shown = pattern(kind, N, M, rng)
        assert (mask_of(lists.lower(shown, call, "cpu"), call) == shown.mask(call)).all()


def test_what_is_full_needs_no_lists():
    call = Call(Shape(B, H, G, 40, 40))
    shown = Union((pattern("blocks + columns", 40, 40, torch.Generator().manual_seed(5)), Full()))
    lowered = lists.lower(shown, call, "cpu")
    assert lowered.index is None and lowered.tokens is None and lowered.recent.tolist() == [lists.EVERYTHING]


@interpreted
@pytest.mark.parametrize(
    ("K", "T", "block_k", "high"), [(5, 9, 4, 50), (1, 3, 7, 30), (16, 40, 3, 200), (3, 1100, 2, 900)]
)
def test_the_kernels_that_order_lists_equal_plain_pytorch(K, T, block_k, high):
    rng = torch.Generator().manual_seed(K)
    blocks, tokens = index(rng, 2, 2, 3, K, high), index(rng, 2, 2, 1, T, high * block_k)
    ordered, count = lists.arrange(blocks)
    want, want_count = lists._ascending(blocks, False)
    assert (ordered == want).all() and (count == want_count).all()
    tokens, _ = lists._ascending(tokens, False)
    for t, o, c in ((tokens, ordered, count), (tokens[:1], ordered, count), (tokens, ordered[:1], count[:1])):
        assert (lists.outside(t, o, c, block_k, 2) == lists._outside(t, o, c, block_k)).all()


# the Hopper kernel, as far as a CPU can tell


def plain(kernel):
    """A helper of the kernel as a Python function of integers."""
    numbers = types.SimpleNamespace(
        where=lambda c, a, b: a if c else b,
        minimum=min,
        maximum=max,
        load=lambda at, mask=True, other=None: at[0][at[1]] if mask else other,
    )
    return types.FunctionType(kernel.fn.__code__, {"gl": numbers})


class Row(tuple):
    """A pointer into a list."""

    def __add__(self, step):
        return Row((self[0], self[1] + step))


def test_the_hopper_kernel_visits_each_pair_once():
    hopper = pytest.importorskip("saccade.kernels.attend.triton_hopper", reason="this Triton has no Gluon")
    ends, spans, tile = (plain(f) for f in (hopper._ends, hopper._spans, hopper._tile))
    rng = random.Random(0)
    for _ in range(400):
        R, BN, SUBS = rng.choice([8, 16]), rng.choice([4, 8]), rng.choice([1, 2, 3])
        N = rng.randint(1, 60)
        M, block_k, causal = N + rng.randint(0, 40), BN * SUBS, rng.random() < 0.6
        block_q = R * rng.choice([1, 2])
        first = R * rng.randrange(-(-N // R))
        until = (first // block_q + 1) * block_q
        windows = rng.random() < 0.7
        listing = not windows or rng.random() < 0.7
        sink, recent = (rng.choice([0, 3, 9, 50, 200]), rng.choice([1, 2, 7, 20, 70, 1 << 30])) if windows else (0, 0)
        if rng.random() < 0.2:
            sink = recent = 0
        low, high = ends(first, until, R, N, M - N)
        ns = nf = lo = a = z = hi = 0
        band = M
        if windows:
            ns, nf, lo, a, z, hi, band = spans(low, high, M, sink, recent, BN, causal)
        blocks = sorted(rng.sample(range(-(-M // block_k)), rng.randint(0, -(-M // block_k)))) if listing else []
        n = s = len(blocks)
        f = 0
        while s and (blocks[s - 1] + 1) * block_k > min(low + 1 if causal else M, band):
            s -= 1
        while f < s and blocks[f] * block_k < sink:
            f += 1
        edges = (ns - nf) + (a - lo) + (hi - z) + (n - s + f) * SUBS
        got = []
        for i in range(edges + nf + z - a + (s - f) * SUBS):
            start, listed = tile(
                i, edges, f, s, ns, nf, lo, a, z, hi, Row((blocks, 0)), block_k, SUBS, BN, windows, listing
            )
            for p in range(first + M - N, min(first + R, until, N) + M - N):
                for j in range(start, start + BN):
                    near = windows and (j < sink or abs(p - j) < recent)
                    if i >= edges:
                        assert j < M and (j <= p or not causal)
                        got.append((p, j))
                    elif j < M and (j <= p or not causal) and near != (listed and listing):
                        got.append((p, j))
        want = [
            (p, j)
            for p in range(first + M - N, min(first + R, until, N) + M - N)
            for j in range(M)
            if (j <= p or not causal) and (j // block_k in blocks or j < sink or abs(p - j) < recent)
        ]
        assert sorted(got) == sorted(want)


def test_what_the_hopper_kernel_serves():
    hopper = pytest.importorskip("saccade.kernels.attend.triton_hopper", reason="this Triton has no Gluon")

    def served(shown, N=300, D=128, Dv=128, dtype=torch.bfloat16, bias=None, **fields):
        q, k, v = torch.zeros(1, 8, N, D, dtype=dtype), *(torch.zeros(1, 2, N, d, dtype=dtype) for d in (D, Dv))
        call = Call.of(q, k, **fields)
        return hopper.serves(q, k, v, lists.lower(shown, call, "cpu"), call, bias)

    def blocks(block_q, block_k, heads=2):
        return Blocks(torch.zeros(1, heads, -(-300 // block_q), 1).int(), block_q, block_k)

    columns = Tokens(torch.zeros(1, 1, 1, 1).int())
    assert all(served(s) for s in (Full(), Window(3, 70), blocks(128, 128), blocks(64, 64), blocks(256, 192, 8)))
    assert served(Full(), D=80, Dv=80, dtype=torch.float16) and served(blocks(32, 64), D=256, Dv=256)
    assert not any(served(s) for s in (columns, Union((columns, Window(1, 2))), blocks(128, 16), blocks(64, 64, 8)))
    assert not served(Full(), dtype=torch.float32) and not served(Full(), Dv=64) and not served(Full(), D=32, Dv=32)
    assert not served(Full(), bias=torch.zeros(1, 1, 300)) and not served(Full(), D=100, Dv=100)
    assert not served(Full(), q_pos=torch.arange(300)[None], k_pos=torch.arange(300)[None, None])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "kind", ["full", "wide window", "blocks of 64", "blocks of 128", "per head", "blocks + columns"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_a_gpu_no_worse_than_plain_pytorch(kind, dtype):
    for seed, (N, M, D) in enumerate([(1, 1, 64), (300, 300, 128), (129, 1000, 128), (515, 515, 80), (200, 257, 256)]):
        rng = torch.Generator().manual_seed(seed)
        q, k, v = (t.cuda() for t in make(N, M, D, D, rng, dtype))
        size = {"blocks of 64": 64, "blocks of 128": 128}.get(kind)
        if size is None:
            shown = pattern(kind, N, M, rng)
        else:
            shown = Blocks(index(rng, 1, G, -(-N // size), 4, -(-M // size)), size, size)
        call = Call.of(q, k)
        got = attend(q, k, v, shown, call, impl="triton")
        mask = shown.mask(Call(Shape(B, H, G, N, M))).cuda()
        wide = [t.double() for t in (q, *(t.repeat_interleave(H // G, 1) for t in (k, v)))]
        plain = [t.to(dtype) for t in wide]
        both = []
        for a, b, c in (wide, plain):
            scores = ((a @ b.transpose(-1, -2)) * D**-0.5).masked_fill(~mask, float("-inf"))
            both.append((scores.softmax(-1).nan_to_num(0.0) @ c, scores.logsumexp(-1)))
        (truth, lse), (other, _) = both
        assert (got.o - truth).abs().max() <= 2 * (other - truth).abs().max() + 1e-6
        torch.testing.assert_close(got.lse.double(), lse, atol=1e-4, rtol=1e-4)
