"""scan: reference = chunked, state splits anywhere, nothing overflows, hand cases and errors."""

import pytest
import torch

from saccade.core.errors import InputError, UnsupportedError
from saccade.kernels.scan import scan

KINDS = ("none", "head", "token", "channel", "shared channel")
LENGTHS = (1, 2, 63, 64, 65, 130)


def inputs(N, kind, B=2, H=3, D=5, E=4, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, H, N, D, generator=rng, dtype=dtype) for _ in range(2))
    v = torch.randn(B, H, N, E, generator=rng, dtype=dtype)
    state = torch.randn(B, H, D, E, generator=rng, dtype=dtype)
    shape = {"head": (H,), "token": (B, H, N), "channel": (B, H, N, D), "shared channel": (1, H, 1, D)}.get(kind)
    decay = None if shape is None else -torch.rand(shape, generator=rng, dtype=dtype) * 2
    return q, k, v, decay, state


def loop(q, k, v, decay, state):
    """Written from the definition: o_t = sum over j <= t of the product of factors between, times (q_t . k_j) v_j."""
    B, H, N, D = q.shape
    if decay is None:
        decay = q.new_zeros(H)
    if decay.ndim == 1:
        decay = decay[None, :, None]
    if decay.ndim == 3:
        decay = decay[..., None]
    decay = decay.expand(B, H, N, D)
    o = torch.zeros_like(v)
    for b in range(B):
        for h in range(H):
            for t in range(N):
                o[b, h, t] += (q[b, h, t] * decay[b, h, : t + 1].sum(0).exp()) @ state[b, h]
                for j in range(t + 1):
                    factor = decay[b, h, j + 1 : t + 1].sum(0).exp()
                    o[b, h, t] += (q[b, h, t] * factor * k[b, h, j]).sum() * v[b, h, j]
    return o


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind, impl):
    q, k, v, decay, state = inputs(11, kind, B=1, H=2)
    o, _ = scan(q, k, v, decay, state, impl=impl, chunk=4)
    torch.testing.assert_close(o, loop(q, k, v, decay, state))


@pytest.mark.parametrize("N", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_equals_reference(kind, N):
    q, k, v, decay, state = inputs(N, kind)
    want = scan(q, k, v, decay, state, impl="reference")
    for chunk in (1, 16, 48, 64, 256):
        torch.testing.assert_close(scan(q, k, v, decay, state, impl="chunked", chunk=chunk), want)


@pytest.mark.parametrize("N", [1, 63, 64, 65, 513])
def test_float32_is_close_to_the_quadratic_form(N):
    q, k, v, _, _ = (t if t is None else t / 10 for t in inputs(N, "none", H=4, D=16, E=16, dtype=torch.float32))
    slope = torch.tensor([0.5, 0.1, 0.01, 0.0])
    t = torch.arange(N)
    weight = torch.exp(-slope[:, None, None].double() * (t[:, None] - t).clamp_min(0)).tril()
    want = ((q.double() @ k.double().mT) * weight) @ v.double()
    assert (scan(q, k, v, -slope)[0] - want).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 37, 64, 99])
def test_a_sequence_may_be_cut_anywhere(kind, cut):
    q, k, v, decay, state = inputs(100, kind)

    def part(a, b):
        return decay if decay is None or decay.ndim == 1 or decay.shape[2] == 1 else decay[:, :, a:b]

    want, end = scan(q, k, v, decay, state)
    first, middle = scan(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], part(0, cut), state)
    second, last = scan(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], part(cut, 100), middle)
    torch.testing.assert_close(torch.cat((first, second), 2), want)
    torch.testing.assert_close(last, end)


def test_token_by_token_equals_one_call():
    q, k, v, decay, _ = inputs(70, "head")
    state, outs = None, []
    for t in range(70):
        o, state = scan(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], decay, state)
        outs.append(o)
    want, end = scan(q, k, v, decay)
    torch.testing.assert_close(torch.cat(outs, 2), want)
    torch.testing.assert_close(state, end)


def test_halving_factor_by_hand():
    one = torch.ones(1, 1, 4, 1)
    o, state = scan(one, one, one, torch.tensor([0.5]).log(), impl="chunked", chunk=3)
    torch.testing.assert_close(o.flatten(), torch.tensor([1.0, 1.5, 1.75, 1.875]))
    torch.testing.assert_close(state.flatten(), torch.tensor([1.875]))


def test_no_decay_is_a_running_sum_and_a_large_one_sees_itself():
    q, k, v, _, _ = inputs(65, "none")
    state = (k[..., :, None] * v[..., None, :]).cumsum(2)
    torch.testing.assert_close(scan(q, k, v)[0], (q[..., None, :] @ state)[..., 0, :])
    alone = (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(scan(q, k, v, torch.full((3,), -50.0, dtype=q.dtype))[0], alone)


@pytest.mark.parametrize("shape", [(1,), (1, 1, 2000), (1, 1, 2000, 4)])
@pytest.mark.parametrize("factor", [-1e-4, -0.5, -80.0])
def test_long_sequences_stay_finite_in_float32(shape, factor):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 2000, 4, generator=rng) for _ in range(3))
    decay = torch.full(shape, factor, requires_grad=True)
    o, state = scan(q, k, v, decay)
    want = scan(q.double(), k.double(), v.double(), decay.double(), impl="reference")[0]
    assert (o - want).abs().max() < 1e-5 * want.abs().max()
    (o.sum() + state.sum()).backward()
    assert decay.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_change_no_bit(kind):
    q, k, v, decay, state = inputs(130, kind, dtype=torch.float32)
    changed = [t.clone() for t in (q, k, v)]
    for t in changed:
        t[:, :, 40:] += 1.0
    a, b = scan(q, k, v, decay, state)[0], scan(*changed, decay, state)[0]
    assert torch.equal(a[:, :, :40], b[:, :, :40])
    assert not torch.equal(a[:, :, 40:], b[:, :, 40:])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, impl):
    q, k, v, decay, state = inputs(7, kind, B=1, H=2, D=3, E=2)
    leaves = [t.requires_grad_() for t in (q, k, v, state)]
    if decay is None:
        assert torch.autograd.gradcheck(lambda q, k, v, s: scan(q, k, v, None, s, impl=impl, chunk=3), leaves)
        return
    # away from 0, where finite differences would leave the domain
    decay = (decay - 0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v, s, d: scan(q, k, v, d, s, impl=impl, chunk=3), (*leaves, decay), atol=1e-6
    )


def test_half_precision_keeps_a_wide_state():
    q, k, v, decay, _ = inputs(100, "head")
    half = [t.bfloat16() for t in (q, k, v)]
    o, state = scan(*half, decay.float())
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    want, end = scan(*(t.double() for t in half), decay)
    torch.testing.assert_close(o.double(), want, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(state.double(), end, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scan(*half, decay.float())[1], state)


def test_bad_input_says_what_was_seen():
    q, k, v, _, _ = inputs(6, "none")
    bad = [
        ((q[0], k, v), "length, width"),
        ((q, k[..., :3], v), r"\[2, 3, 6, 3\]"),
        ((q, k, v[:, :2]), r"v \[2, 2, 6, 4\]"),
        ((q[:, :, :0], k[:, :, :0], v[:, :, :0]), "empty"),
        ((q, k, v, torch.zeros(2)), r"got \[2\]"),
        ((q, k, v, torch.zeros(1)), r"got \[1\]"),
        ((q, k, v, torch.zeros(2, 3)), r"got \[2, 3\]"),
        ((q, k, v, torch.ones(3)), "log of a factor"),
        ((q, k, v, torch.full((3,), float("-inf"))), "finite"),
        ((q, k, v, torch.zeros(3, dtype=torch.long)), "int64"),
        ((q, k, v, None, torch.zeros(2, 3, 4, 5)), r"state must be \[2, 3, 5, 4\]"),
    ]
    for args, said in bad:
        with pytest.raises(InputError, match=said):
            scan(*args)
    with pytest.raises(InputError, match="chunk"):
        scan(q, k, v, chunk=0)
    with pytest.raises(InputError, match="impl"):
        scan(q, k, v, impl="fast")
    with pytest.raises(UnsupportedError, match="triton"):
        scan(q, k, v, impl="triton")
