"""Summaries of blocks, in PyTorch and as a kernel, against loops in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.kernels.scores import bound_scores, pool, pool_bounds, pooled_scores

triton_pool = pytest.importorskip("saccade.kernels.select.triton_pool", reason="Triton is not installed")


def by_loop(x, block):
    """Mean, smallest and largest of each block, [blocks, D] each, of x [N, D]."""
    rows, found = x.double().tolist(), []
    for start in range(0, len(rows), block):
        columns = list(zip(*rows[start : start + block], strict=True))
        found.append([[sum(c) / len(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]])
    return torch.tensor(found, dtype=torch.float64).unbind(1)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 130),
    st.sampled_from([5, 16, 64, 100]),
    st.sampled_from([1, 3, 16, 40]),
    st.sampled_from([torch.float32, torch.float16]),
)
def test_kernel_and_pytorch_match_the_loop(N, block, D, dtype):
    x = torch.randn(1, N, 2, 2 * D, generator=torch.Generator().manual_seed(N)).to(dtype).transpose(1, 2)[..., ::2]
    kernel = triton_pool.pool(x, block, mean=True, bounds=True)
    plain = pool(x, block), *pool_bounds(x, block)
    for b in range(1):
        for h in range(2):
            mean, low, high = by_loop(x[b, h], block)
            close = 1e-6 if dtype == torch.float32 else 2e-3  # half of a float16's last place at 4
            for got in (kernel, plain):
                torch.testing.assert_close(got[0][b, h].double(), mean, atol=close, rtol=0)
                assert torch.equal(got[1][b, h].double(), low) and torch.equal(got[2][b, h].double(), high)
    assert all(t.dtype == dtype for t in (*kernel, *plain))


def test_only_what_is_asked_for_is_made():
    x = torch.randn(1, 1, 8, 4)
    mean, low, high = triton_pool.pool(x, 4)
    assert low is None and high is None and torch.allclose(mean, x.view(1, 1, 2, 4, 4).mean(3))
    mean, low, high = triton_pool.pool(x, 4, mean=False, bounds=True)
    assert mean is None and torch.equal(low, x.view(1, 1, 2, 4, 4).amin(3))


def test_sums_are_wide():
    # 1 + 2^-9 is not a bfloat16, and neither is the sum of a hundred: both must be made in float32
    x = torch.full((1, 1, 100, 1), 1.0)
    x[:, :, ::2] += 2.0**-6
    for got in (pool(x.bfloat16(), 100), triton_pool.pool(x.half(), 100)[0], pool(x.half(), 100)):
        assert abs(got.item() - (1 + 2.0**-7)) <= 2.0**-9
    assert pooled_scores(x.half(), x.half(), 100, 100).dtype == torch.float32


def test_gradients_flow():
    x = torch.randn(1, 2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pool(x, 4), (x,))


@pytest.mark.parametrize(("H", "G"), [(4, 2), (2, 2)])
def test_bounds_hold_and_are_reached(H, G):
    q, k = torch.randn(2, H, 3, 6, dtype=torch.float64), torch.randn(2, G, 21, 6, dtype=torch.float64)
    bound = bound_scores(q, k, 8)
    assert bound.shape == (2, H, 3, 3)
    for h in range(H):
        for j in range(3):
            part = k[:, h * G // H, 8 * j : 8 * j + 8]
            low, high = part.aminmax(dim=1)
            best = (q[:, h] * low[:, None]).maximum(q[:, h] * high[:, None]).sum(-1)
            torch.testing.assert_close(bound[:, h, :, j], best)
            assert ((q[:, h] @ part.transpose(1, 2)).amax(-1) <= bound[:, h, :, j] + 1e-12).all()
    # a block of one key is bounded by its own product
    torch.testing.assert_close(bound_scores(q, k, 1), (q.unflatten(1, (G, -1)) @ k[:, :, None].mT).flatten(1, 2))
