"""merge: softmax over a union from the results on its parts."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.kernels.attend import attend
from saccade.kernels.merge import Out, merge


def parts_of(q, k, v, cuts):
    edges = [0, *sorted(cuts), k.shape[2]]
    call = [attend_all(q, k[:, :, a:b], v[:, :, a:b]) for a, b in pairwise(edges) if a < b]
    return call


def attend_all(q, k, v):
    scores = q @ k.transpose(-1, -2)
    return Out(torch.softmax(scores, -1) @ v, scores.logsumexp(-1))


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, 29), max_size=6), st.integers(0, 100), st.randoms(use_true_random=False))
def test_any_split_of_the_keys(cuts, seed, order):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, n, 8, generator=rng, dtype=torch.float64) * 3 for n in (5, 30, 30))
    parts = parts_of(q, k, v, cuts)
    order.shuffle(parts)
    whole = attend_all(q, k, v)
    got = merge(parts)
    torch.testing.assert_close(got.o, whole.o, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(got.lse, whole.lse, atol=1e-13, rtol=1e-13)


def test_merging_twice_is_merging_once():
    q, k, v = (torch.randn(1, 2, n, 4).double() for n in (3, 12, 12))
    a, b, c = parts_of(q, k, v, {4, 8})
    for one, other in zip(merge([merge([a, b]), c]), merge([a, b, c]), strict=True):
        torch.testing.assert_close(one, other)


def test_a_part_without_keys_weighs_nothing():
    q, k, v = (torch.randn(1, 2, 3, 4).double() for _ in range(3))
    some = attend_all(q, k, v)
    none = Out(torch.zeros_like(some.o), torch.full_like(some.lse, float("-inf")))
    for got in (merge([some, none]), merge([none, some])):
        torch.testing.assert_close(got.o, some.o)
        torch.testing.assert_close(got.lse, some.lse)
    nothing = merge([none, none, none])
    assert not nothing.o.any() and nothing.lse.isneginf().all()


def test_large_lse_do_not_overflow():
    a, b = (
        Out(torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), 5000.0)),
        Out(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1)),
    )
    got = merge([a, b])
    assert got.o.eq(1).all() and got.lse.item() == 5000.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_keeps_dtypes(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = Out(torch.ones(1, 1, 2, 3, dtype=dtype), torch.zeros(1, 1, 2, dtype=wide))
    got = merge([out, out])
    assert got.o.dtype == dtype and got.lse.dtype == wide
    assert (got.o == 1).all()


def test_gradients():
    o = [torch.randn(1, 1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lse = [torch.randn(1, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b, s, t: tuple(merge([Out(a, s), Out(b, t)])), (*o, *lse))


def test_gradients_of_rows_without_keys_are_finite():
    q, k, v = (torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    lse = torch.full((1, 1, 4), float("-inf"), dtype=torch.float64)
    zeros = Out(v * 0, lse + q.sum() * 0)
    merge([zeros, zeros]).o.sum().backward()
    assert v.grad.isfinite().all() and q.grad.isfinite().all()


def test_one_result_is_itself():
    out = Out(torch.ones(1, 1, 1, 1), None)
    assert merge([out]) is out


def test_bad_input():
    out = Out(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    with pytest.raises(ValueError, match="lse=True"):
        merge([out, Out(out.o)])


def test_of_attend_over_two_stores():
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    old, new = attend_gqa(q, k[:, :, :37], v[:, :, :37]), attend(q, k[:, :, 37:], v[:, :, 37:])
    torch.testing.assert_close(merge([old, new]).o, attend(q, k, v).o, atol=1e-5, rtol=1e-5)


def attend_gqa(q, k, v):
    return attend_all(q / q.shape[3] ** 0.5, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
