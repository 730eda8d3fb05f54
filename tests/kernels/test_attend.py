"""attend: tiled equals the reference for all patterns in all calls, gradients too; precision; bad input."""

import itertools

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Blocks, Full, PerHead, Tokens, Union, Window
from saccade.kernels import attend as package
from saccade.kernels.attend import attend, blocks, tiled

SIZES = [(1, 1), (1, 130), (2, 65), (7, 7), (16, 64), (17, 129), (63, 64), (64, 64), (65, 65), (65, 128), (128, 129)]
B, H, G = 2, 4, 2


def index(rng, rows, heads, lines, count, high):
    """Distinct slots per line in no order, some lines short, some empty."""
    found = torch.rand(rows, heads, lines, high, generator=rng).argsort(-1)[..., :count]
    found = torch.nn.functional.pad(found, (0, count - found.shape[-1]), value=-1)
    keep = torch.randint(0, count + 1, (rows, heads, lines, 1), generator=rng)
    return found.masked_fill(torch.arange(count) >= keep, -1).int()


def make_pattern(kind, N, M, rng):
    if kind == "full":
        return Full()
    if kind == "window":
        return Window(3, 9)
    if kind == "window no sink":
        return Window(0, 20)
    if kind == "window wide":
        return Window(M // 3, M // 2 + 1)
    if kind == "window per head":
        return Window(torch.tensor([0, 3, 3, 70]), torch.tensor([1, 9, 9, 33]))
    if kind == "blocks":
        return Blocks(index(rng, B, H, -(-N // 16), 3, -(-M // 16)), 16, 16)
    if kind == "blocks odd":
        return Blocks(index(rng, 1, G, -(-N // 24), 5, -(-M // 7)), 24, 7)
    if kind == "blocks shared":
        return Blocks(index(rng, B, 1, -(-N // 5), 2, -(-M // 33)), 5, 33)
    if kind == "tokens":
        return Tokens(index(rng, B, H, N, 6, M))
    if kind == "tokens of a kv head":
        return Tokens(index(rng, 1, G, N, 9, M))
    if kind == "columns":
        return Tokens(index(rng, B, H, 1, 8, M))
    if kind == "columns of a kv head":
        return Tokens(index(rng, B, G, 1, 8, M))
    parts = kind.split(" + ")
    if len(parts) > 1:
        return Union(tuple(make_pattern(part, N, M, rng) for part in parts))
    assert kind == "per head"
    return PerHead(
        (
            ((2, 0), Union((Window(2, 5), Tokens(index(rng, B, 2, 1, 4, M))))),
            ((3,), Full()),
            ((1,), Blocks(index(rng, B, 1, -(-N // 16), 2, -(-M // 16)), 16, 16)),
        )
    )


KINDS = [
    "full",
    "window",
    "window no sink",
    "window wide",
    "window per head",
    "blocks",
    "blocks odd",
    "blocks shared",
    "tokens",
    "tokens of a kv head",
    "columns",
    "columns of a kv head",
    "blocks + columns",
    "blocks odd + columns of a kv head",
    "columns of a kv head + blocks odd",
    "window + blocks",
    "blocks + window",
    "window per head + tokens of a kv head",
    "blocks odd + window + tokens + columns",
    "blocks + per head",
    "per head + columns of a kv head",
    "per head",
]


def make_call(kind, q, k, rng):
    if kind == "causal":
        return Call.of(q, k)
    if kind == "scaled":
        return Call.of(q, k, scale=0.7)
    if kind == "not causal":
        return Call.of(q, k, causal=False)
    N, M = q.shape[2], k.shape[2]
    k_pos = torch.rand(B, G, 2 * M, generator=rng).argsort(-1)[..., :M].sort(-1).values
    k_pos[torch.rand(k_pos.shape, generator=rng) < 0.1] = -1
    q_pos = torch.arange(2 * M - N, 2 * M).repeat(B, 1)
    q_pos[torch.rand(q_pos.shape, generator=rng) < 0.1] = -1
    if kind == "holes shared":
        q_pos, k_pos = q_pos[:1], k_pos[:1, :1]
    return Call.of(q, k, q_pos=q_pos, k_pos=k_pos, causal=kind != "holes, not causal")


CALLS = ["causal", "scaled", "not causal", "holes", "holes shared", "holes, not causal"]


def make(N, M, seed=0, D=8, Dv=None, dtype=torch.float64, rows=B):
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, H, N, D, generator=rng, dtype=torch.float64)
    k = torch.randn(rows, G, M, D, generator=rng, dtype=torch.float64)
    v = torch.randn(rows, G, M, D if Dv is None else Dv, generator=rng, dtype=torch.float64)
    return [t.to(dtype) for t in (q, k, v)], rng


def same(a, b):
    torch.testing.assert_close(a.o, b.o, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(a.lse, b.lse, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("call_kind", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_tiled_equals_reference(kind, call_kind):
    for seed, (N, M) in enumerate(SIZES):
        (q, k, v), rng = make(N, M, seed, Dv=8 if seed % 2 else 5)
        call, pattern = make_call(call_kind, q, k, rng), make_pattern(kind, N, M, rng)
        bias = [None, torch.randn(B, G, M, generator=rng).double(), torch.randn(1, 1, M, generator=rng).double()]
        for key_bias in (bias[0], bias[1 + seed % 2]):
            want = attend(q, k, v, pattern, call, key_bias=key_bias, impl="reference")
            same(attend(q, k, v, pattern, call, key_bias=key_bias, impl="tiled"), want)
            without = attend(q, k, v, pattern, call, key_bias=key_bias, lse=False, impl="tiled")
            torch.testing.assert_close(without.o, want.o, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("tile", [1, 700, 1 << 14])
@pytest.mark.parametrize("kind", KINDS)
def test_tile_size_changes_nothing(kind, tile, monkeypatch):
    (q, k, v), rng = make(70, 129)
    pattern, call = make_pattern(kind, 70, 129, rng), Call.of(q, k)
    want = attend(q, k, v, pattern, call)
    monkeypatch.setattr(tiled, "tile_size", lambda device: tile)
    monkeypatch.setattr(blocks, "tile_size", lambda device: tile)
    same(attend(q, k, v, pattern, call), want)


@pytest.mark.parametrize("call_kind", ["causal", "not causal", "holes"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_reference_s(kind, call_kind):
    for seed, (N, M) in enumerate([(1, 9), (19, 33), (66, 70)]):
        (q, k, v), rng = make(N, M, seed, Dv=6)
        call, pattern = make_call(call_kind, q, k, rng), make_pattern(kind, N, M, rng)
        bias = torch.randn(B, G, M, generator=rng).double()
        grads = []
        for impl in ("reference", "tiled"):
            leaves = [t.detach().requires_grad_() for t in (q, k, v, bias)]
            out = attend(*leaves[:3], pattern, call, key_bias=leaves[3], impl=impl)
            total = (out.o * torch.linspace(-1, 1, out.o.numel()).view_as(out.o)).sum()
            real = ~out.lse.isneginf()
            total = total + (out.lse[real] * torch.linspace(0, 1, int(real.sum()))).sum()
            grads.append(torch.autograd.grad(total, leaves))
        for got, want in zip(grads[1], grads[0], strict=True):
            assert want.isfinite().all()
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("kind", ["full", "window", "blocks", "tokens", "columns", "blocks + columns", "per head"])
def test_gradcheck(kind, impl):
    (q, k, v), rng = make(6, 9, D=3)
    call, pattern = make_call("holes" if kind == "full" else "causal", q, k, rng), make_pattern(kind, 6, 9, rng)
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def outputs(q, k, v):
        o, lse = attend(q, k, v, pattern, call, impl=impl)
        return o, lse.masked_fill(lse.isneginf(), 0.0)

    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_row_without_keys_gives_zero(impl, grad):
    (q, k, v), _ = make(20, 40)
    empty = torch.full((1, 1, 1, 1), -1).int()
    some = torch.arange(25, 26).view(1, 1, 1, 1).int()
    nothing = Call.of(q, k, q_pos=torch.full((1, 20), -1), k_pos=torch.arange(40)[None, None])
    unfilled = Call.of(q, k, q_pos=torch.arange(20)[None], k_pos=torch.full((1, 1, 40), -1))
    for pattern, call, rows in [
        (Tokens(empty), None, slice(0, 20)),
        (Blocks(empty.expand(1, 1, 2, 1), 16, 16), None, slice(0, 20)),
        (Union((Blocks(empty.expand(1, 1, 2, 1), 16, 16), Tokens(some))), None, slice(0, 5)),
        (Tokens(some), None, slice(0, 5)),
        (Full(), nothing, slice(0, 20)),
        (Window(3, 5), unfilled, slice(0, 20)),
        (Union((Window(3, 5), Tokens(some))), nothing, slice(0, 20)),
    ]:
        leaves = [t.clone().requires_grad_(grad) for t in (q, k, v)]
        out = attend(*leaves, pattern, call, impl=impl)
        assert not out.o[:, :, rows].any() and out.lse[:, :, rows].isneginf().all()
        assert out.o.isfinite().all()
        if grad:
            total = out.o.sum() + out.lse.masked_fill(out.lse.isneginf(), 0.0).sum()
            # where no row has a key there may be nothing to go back to
            grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else ()
            assert all(grad is None or grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("N", [1, 65, 300])
def test_agrees_with_sdpa(N, causal):
    (q, k, v), _ = make(N, N, D=16)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    for impl, lse in itertools.product(["auto", "tiled", "reference"], [True, False]):
        out = attend(q, k, v, call=Call.of(q, k, causal=causal), impl=impl, lse=lse)
        torch.testing.assert_close(out.o, want)


def plain(q, k, v, mask):
    """What plain PyTorch does in the tensors' own dtype."""
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) / q.shape[3] ** 0.5
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["full", "window", "blocks", "tokens", "columns", "blocks + columns"])
def test_error_is_at_most_twice_plain_pytorch_s(kind, dtype):
    (q, k, v), rng = make(257, 257, D=64, dtype=dtype)
    call, pattern = Call.of(q, k), make_pattern(kind, 257, 257, rng)
    mask = pattern.mask(call) | torch.eye(257, dtype=torch.bool)
    pattern = Union((pattern, Tokens(torch.arange(257).view(1, 1, 257, 1).int()))) if kind != "full" else pattern
    exact = plain(q.double(), k.double(), v.double(), mask)
    theirs = (plain(q, k, v, mask).double() - exact).abs()
    with torch.no_grad():
        out = attend(q, k, v, pattern, call)
    ours = (out.o.double() - exact).abs()
    assert out.o.dtype == dtype and out.lse.dtype == torch.float32
    assert ours.max() <= 2 * theirs.max() + 1e-6
    assert ours.mean() <= 2 * theirs.mean() + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "blocks", "window"])
def test_gradient_error_is_at_most_three_times_plain_pytorch_s(kind, dtype):
    (q, k, v), rng = make(130, 130, D=32, dtype=dtype)
    call, pattern = Call.of(q, k), make_pattern(kind, 130, 130, rng)
    if kind == "blocks":
        pattern = Blocks(torch.stack((torch.arange(9), torch.arange(9) - 2), -1).view(1, 1, 9, 2).int(), 16, 16)
        pattern.index[pattern.index < 0] = -1
    mask, grads = pattern.mask(call), []
    weight = torch.linspace(-1, 1, q.numel()).view_as(q)
    for function, to in ((plain, torch.float64), (plain, dtype), (attend, dtype)):
        leaves = [t.to(to).requires_grad_() for t in (q, k, v)]
        o = function(*leaves, mask) if function is plain else function(*leaves, pattern, call, lse=False).o
        grads.append(torch.autograd.grad((o * weight.to(to)).sum(), leaves))
    for exact, theirs, ours in zip(*grads, strict=True):
        limit = 3 * (theirs.double() - exact).abs().max() + 1e-5
        assert (ours.double() - exact).abs().max() <= limit


def test_large_logits_do_not_overflow():
    (q, k, v), _ = make(70, 70, dtype=torch.float32)
    for impl in ("reference", "tiled"):
        out = attend(q * 1e3, k * 1e3, v, impl=impl)
        assert out.o.isfinite().all() and out.lse.isfinite().all()
        torch.testing.assert_close(out.o.abs().amax(), v.abs().amax(), rtol=0.5, atol=0)


def test_nan_in_a_key_reaches_the_rows_that_see_it_and_no_others():
    (q, k, v), _ = make(40, 40)
    k[0, 0, 20] = float("nan")
    for pattern in (Full(), Window(0, 5)):
        rows = attend(q, k, v, pattern).o[0, 0].isnan().any(-1)
        assert rows[20] and not rows[:20].any()


def test_inputs_are_not_written_to_and_need_not_be_contiguous():
    (q, k, v), rng = make(33, 65, D=8)
    for kind in KINDS:
        pattern = make_pattern(kind, 33, 65, rng)
        want = attend(q, k, v, pattern)
        strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
        kept = [t.clone() for t in strided]
        same(attend(*strided, pattern), want)
        assert all(torch.equal(a, b) for a, b in zip(strided, kept, strict=True))


def test_expanded_keys():
    (q, k, v), rng = make(33, 65)
    k, v = k[:1].expand(B, -1, -1, -1), v[:1].expand(B, -1, -1, -1)
    for kind in KINDS:
        pattern = make_pattern(kind, 33, 65, rng)
        same(attend(q, k, v, pattern), attend(q, k.contiguous(), v.contiguous(), pattern))


def test_attend_of_the_package_is_the_one():
    assert package.attend is attend


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_q_that_is_not_finite(bad):
    (q, k, v), _ = make(5, 9)
    q[1, 2, 3, 4] = bad
    with pytest.raises(InputError, match=r"1 places.*\[1, 2, 3, 4\].*layer 6"):
        attend(q, k, v, call=Call.of(q, k, layer=6))


def test_implementations_that_are_not_there():
    (q, k, v), _ = make(5, 9)
    with pytest.raises(UnsupportedError, match="triton"):
        attend(q, k, v, impl="triton")
    with pytest.raises(InputError, match="triton"):
        attend(q, k, v, impl="cuda")


@pytest.mark.parametrize("shape", [(1, 9), (B, H, 8), (3, 1, 9), (B, 3, 9)])
def test_key_bias_that_does_not_fit(shape):
    (q, k, v), _ = make(5, 9)
    for impl in ("tiled", "reference"):
        with pytest.raises(InputError):
            attend(q, k, v, key_bias=torch.zeros(shape).double(), impl=impl)


@pytest.mark.parametrize("call_kind", ["causal", "not causal", "holes"])
@pytest.mark.parametrize(
    "pattern",
    [
        Blocks(torch.zeros(1, 1, 1, 1).int(), 16, 16),  # 40 rows are three blocks of 16
        Blocks(torch.zeros(1, 1, 4, 1).int(), 16, 16),
        Blocks(torch.full((1, 1, 3, 1), 5).int(), 16, 16),  # 80 keys are blocks 0 to 4
        Blocks(torch.full((1, 1, 3, 1), -2).int(), 16, 16),
        Blocks(torch.zeros(3, 1, 3, 1).int(), 16, 16),
        Blocks(torch.zeros(1, 3, 3, 1).int(), 16, 16),
        Tokens(torch.full((1, 1, 1, 1), 80).int()),
        Tokens(torch.zeros(1, 1, 39, 1).int()),
        Tokens(torch.zeros(1, 3, 1, 1).int()),
        Tokens(torch.zeros(3, 1, 1, 1).int()),
        Window(torch.tensor([1, 2, 3]), 4),
        PerHead((((0, 1), Full()),)),
        PerHead((((0, 1, 2, 3), Tokens(torch.full((1, 1, 1, 1), 80).int())),)),
        Union((Full(), Tokens(torch.full((1, 1, 1, 1), 80).int()))),
    ],
    ids=lambda p: type(p).__name__,
)
def test_patterns_that_do_not_fit_the_call(pattern, call_kind):
    (q, k, v), rng = make(40, 80)
    for impl in ("tiled", "reference"):
        with pytest.raises(InputError):
            attend(q, k, v, pattern, make_call(call_kind, q, k, rng), impl=impl)
