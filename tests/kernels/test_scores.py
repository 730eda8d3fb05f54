"""pool and pooled_scores against loops."""

import pytest
import torch

from saccade.kernels.scores import pool, pooled_scores


@pytest.mark.parametrize("block", [1, 4, 7, 64])
@pytest.mark.parametrize("N", [1, 3, 4, 5, 63, 64, 65])
def test_pool_is_the_mean_of_what_a_block_holds(N, block):
    x = torch.randn(2, 3, N, 5, dtype=torch.float64)
    want = torch.stack([part.mean(2) for part in x.split(block, 2)], 2)
    torch.testing.assert_close(pool(x, block), want)


def test_pool_keeps_the_dtype():
    for dtype in (torch.bfloat16, torch.float32):
        assert pool(torch.ones(1, 1, 5, 2, dtype=dtype), 2).dtype == dtype
        assert (pool(torch.ones(1, 1, 5, 2, dtype=dtype), 2) == 1).all()


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (4, 1)])
def test_pooled_scores_are_products_of_means(H, G):
    q, k = torch.randn(2, H, 13, 8, dtype=torch.float64), torch.randn(2, G, 21, 8, dtype=torch.float64)
    got = pooled_scores(q, k, 4, 8)
    assert got.shape == (2, H, 4, 3)
    for h in range(H):
        for i in range(4):
            for j in range(3):
                mean_q, mean_k = q[:, h, 4 * i : 4 * i + 4].mean(1), k[:, h * G // H, 8 * j : 8 * j + 8].mean(1)
                torch.testing.assert_close(got[:, h, i, j], (mean_q * mean_k).sum(-1))
