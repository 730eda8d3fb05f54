"""The Triton kernels of scan, in the interpreter: the reference in float64, its gradients, splits, decode, refusals."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton, which has no wheel for this platform")

from saccade.core.errors import UnsupportedError
from saccade.kernels.scan import reference, scan, triton_channels, triton_chunks
from saccade.kernels.scan import triton as gpu

KINDS = ("none", "head", "token", "shared token", "channel", "shared channel")
NAMES = ("q", "k", "v", "decay", "state")


@pytest.fixture(params=[(16, 2), (32, 100)], ids=["segments of two", "one segment"])
def pieces(request, monkeypatch):
    """Short chunks, and segments of two, or one segment for all."""
    chunk, most = request.param

    def cut(q, v):
        chunks = -(-q.shape[2] // chunk)
        each = min(most, chunks)
        return triton_chunks.Cut(chunk, each, -(-chunks // each))

    monkeypatch.setattr(triton_chunks, "cut", cut)
    monkeypatch.setattr(triton_channels, "cut", cut)


def inputs(N, kind, B=1, H=2, D=16, E=16, dtype=torch.float32, strong=1.0):
    q, k = (torch.randn(B, H, N, D).mul(D**-0.5).to(dtype) for _ in range(2))
    v, state = torch.randn(B, H, N, E).to(dtype), torch.randn(B, H, D, E)
    shape = {
        "head": (H,),
        "token": (B, H, N),
        "shared token": (1, H, N, 1),
        "channel": (B, H, N, D),
        "shared channel": (1, H, 1, D),
    }.get(kind)
    return q, k, v, None if shape is None else -torch.rand(shape) * strong, state


def wide(q, k, v, decay, state):
    """The reference in float64."""
    q, k, v, state = (t.double() for t in (q, k, v, state))
    log = q.new_zeros(1, 1, 1, 1) if decay is None else decay.double()
    log = log[None, :, None, None] if log.ndim == 1 else log[..., None] if log.ndim == 3 else log
    return reference.scan(q, k, v, log, state)


def near(got, want, digits=2e-6):
    """Within rounding of float32, measured at the largest value."""
    error, size = (got.double() - want).abs().max(), want.abs().max()
    assert error <= digits * size, f"{error:.2e} of {size:.2e}"


@pytest.mark.parametrize("N", [17, 48])
@pytest.mark.parametrize("kind", KINDS)
@torch.enable_grad()
def test_equals_the_reference(kind, N, pieces, monkeypatch):
    # loads without masks, which bfloat16 has where all chunks are whole (the interpreter cannot multiply bfloat16)
    monkeypatch.setattr(triton_chunks, "_exact", lambda k, by: k.shape[2] % by.chunk == 0)
    q, k, v, decay, state = inputs(N, kind, B=2 if N == 17 else 1)
    # a leaf that wants its gradient keeps short sequences on the kernels of chunks
    o, end = scan(q.requires_grad_(), k, v, decay, state, impl="triton")
    want, last = wide(q, k, v, decay, state)
    near(o, want)
    near(end, last)
    assert o.dtype == torch.float32 and end.dtype == torch.float32


@pytest.mark.parametrize(("D", "E"), [(32, 16), (20, 33), (64, 40), (129, 16)])
def test_widths_may_differ_and_need_not_be_round(D, E):
    q, k, v, decay, state = inputs(70, "token", B=1, H=1, D=D, E=E)
    leaves = [t.requires_grad_() for t in (q, k, v, decay, state)]
    o, end = scan(*leaves, impl="triton")
    want, last = wide(*leaves)
    near(o, want, 5e-6)
    near(end, last, 5e-6)
    pull = torch.randn_like(o)
    got = torch.autograd.grad(o, leaves, pull)
    for name, a, b in zip(NAMES, got, torch.autograd.grad(want, leaves, pull.double()), strict=True):
        assert a.shape == b.shape, name
        near(a, b.double(), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, pieces):
    values = inputs(41, kind)
    leaves = [None if t is None else t.requires_grad_() for t in values]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in values]
    out, true = scan(*leaves, impl="triton"), wide(*exact)
    pulls = [torch.randn_like(t) for t in out]
    # the state's gradient is part of it: both results are pulled at
    torch.autograd.backward(out, pulls)
    torch.autograd.backward(true, [t.double() for t in pulls])
    for name, a, b in zip(NAMES, leaves, exact, strict=True):
        if a is not None:
            assert a.grad.shape == a.shape and a.grad.dtype == a.dtype, name
            near(a.grad, b.grad, 1e-5)


def test_only_the_gradients_that_are_wanted():
    q, k, v, decay, state = inputs(40, "token", B=1)
    true = [t.double().requires_grad_() for t in (q, k, v, decay, state)]
    want = torch.autograd.grad(wide(*true)[0].sum(), true)
    for at in range(5):
        leaves = [t.clone().requires_grad_(i == at) for i, t in enumerate((q, k, v, decay, state))]
        scan(*leaves, impl="triton")[0].sum().backward()
        near(leaves[at].grad, want[at], 1e-5)
        assert all(t.grad is None for i, t in enumerate(leaves) if i != at)


@pytest.mark.parametrize("kind", ["head", "token", "channel"])
def test_strong_decay_neither_overflows_nor_leaks(kind, pieces):
    q, k, v, decay, state = inputs(70, kind, B=1, strong=80.0)
    leaves = [t.requires_grad_() for t in (q, k, v, decay, state)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    (o, end), (want, last) = scan(*leaves, impl="triton"), wide(*exact)
    # the running sums reach hundreds: their rounding is the exponents'
    near(o, want, 1e-4)
    near(end, last, 1e-4)
    (o.sum() + end.sum()).backward()
    (want.sum() + last.sum()).backward()
    for name, a, b in zip(NAMES, leaves, exact, strict=True):
        assert a.grad.isfinite().all()
        # nearly nothing crosses a token here: the decay's gradient is a difference of numbers of size 1
        assert (a.grad - b.grad).abs().max() <= 1e-4 * max(b.grad.abs().max(), 1.0 if name == "decay" else 0.0)


@pytest.mark.parametrize("cut", [1, 29])
@pytest.mark.parametrize("kind", ["head", "token", "channel"])
def test_a_sequence_may_be_cut_anywhere(kind, cut, pieces):
    q, k, v, decay, state = inputs(40, kind, H=1)

    def part(a, b):
        return decay if decay.ndim == 1 else decay[:, :, a:b]

    want, last = scan(q, k, v, decay, state, impl="triton")
    first, middle = scan(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], part(0, cut), state, impl="triton")
    second, end = scan(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], part(cut, 40), middle, impl="triton")
    near(torch.cat((first, second), 2), want.double())
    near(end, last.double())


@pytest.mark.parametrize("N", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_few_tokens_run_through_the_recurrence(kind, N, monkeypatch):
    monkeypatch.setattr(triton_chunks, "outputs", None)
    q, k, v, decay, state = inputs(N, kind, D=20, E=33)
    o, end = scan(q, k, v, decay, state, impl="triton")
    want, last = wide(q, k, v, decay, state)
    near(o, want)
    near(end, last)


@pytest.mark.parametrize("kind", ["head", "token"])
def test_other_layouts_need_no_copy(kind):
    q, k, v, decay, state = inputs(40, kind)
    want = scan(q, k, v, decay, state, impl="triton")[0]
    # as layers make them: [B,N,H,D] seen as [B,H,N,D]
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(scan(*turned, decay, state, impl="triton")[0], want)
    # the last axis is the one that must be dense
    strided = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    assert torch.equal(scan(*strided, decay, state, impl="triton")[0], want)


def test_half_precision_does_not_round_sums():
    q, k, v, decay, state = inputs(200, "head", B=1, H=1, dtype=torch.float16, strong=0.01)
    q, k, v = q * 1000, k * 1000, v / 1000
    # products of queries and keys beyond what float16 can hold
    assert (q.double() @ k.double().mT).abs().max() > 1e5
    o, end = scan(q, k, v, decay, state / 1000, impl="triton")
    want, last = wide(q, k, v, decay, state / 1000)
    assert o.dtype == torch.float16 and end.dtype == torch.float32
    near(end, last, 1e-5)
    near(o, want, 1e-3)


def test_segments_fill_the_device_and_are_not_too_short():
    def cut(B, H, N):
        return triton_chunks.cut(*(torch.zeros(1).expand(B, H, N, 64),) * 2)

    assert cut(1, 1, 64 * 16 - 1).segments == 1
    assert cut(1, 1, 64 * 64).segments == 4
    assert cut(64, 64, 64 * 64).segments == 1
    for N in (1, 63, 5000, 131072, 10**6):
        by = cut(1, 2, N)
        assert (by.segments - 1) * by.chunks * by.chunk < N <= by.segments * by.chunks * by.chunk


def test_says_what_it_does_not_serve(monkeypatch):
    q, k, v, decay, state = inputs(20, "head")
    with pytest.raises(UnsupportedError, match=r"one dtype.*float64"):
        scan(q.double(), k.double(), v.double(), impl="triton")
    with pytest.raises(UnsupportedError, match="float16"):
        scan(q, k, v.half(), impl="triton")
    with pytest.raises(UnsupportedError, match="float64"):
        scan(q, k, v, decay.double(), impl="triton")
    big = torch.zeros(1, 1, 2, 257)
    with pytest.raises(UnsupportedError, match="257"):
        scan(big, big, big, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UnsupportedError, match="on cpu"):
        scan(q, k, v, decay, state, impl="triton")
    assert gpu.refuses(q, k, v, decay, state) is not None
