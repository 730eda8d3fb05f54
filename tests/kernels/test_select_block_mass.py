"""Block mass as a kernel and in PyTorch: both against a loop over pairs in float64."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saccade.core.call import Call
from saccade.kernels.select.block_mass import block_mass

kernels = pytest.importorskip("saccade.kernels.select.triton_block_mass", reason="Triton is not installed")


def by_loop(q, k, block_q, block_k, scale, causal):
    """One head: q [N, D], k [M, D] -> a list of rows."""
    N, M = len(q), len(k)
    out = [[0.0] * -(-M // block_k) for _ in range(-(-N // block_q))]
    for i in range(N):
        seen = k[: M - N + i + 1] if causal else k
        logits = [sum(x * y for x, y in zip(q[i], key, strict=True)) * scale for key in seen]
        weights = [math.exp(value - max(logits)) for value in logits]
        for j, weight in enumerate(weights):
            out[i // block_q][j // block_k] += weight / sum(weights)
    return out


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 60),
    st.sampled_from([3, 8, 20]),
    st.sampled_from([1, 7, 16, 24]),
    st.sampled_from([5, 16, 32]),
    st.booleans(),
)
@example(33, 0, 8, 16, 16, True)
@example(40, 24, 3, 7, 5, True)
def test_both_match_the_loop(N, past, D, block_q, block_k, causal):
    rng = torch.Generator().manual_seed(N * 7 + past)
    # as attention layers hand them on: transposed, so not contiguous
    q = torch.randn(2, N, 4, D, generator=rng).transpose(1, 2)
    k = torch.randn(2, N + past, 2, D, generator=rng).transpose(1, 2) * 2
    call = Call.of(q, k, scale=0.4, causal=causal)
    kernel, plain = kernels.block_mass(q, k, call, block_q, block_k), block_mass(q, k, call, block_q, block_k)
    for b, h in ((0, 0), (1, 3)):
        want = torch.tensor(
            by_loop(q[b, h].double().tolist(), k[b, h // 2].double().tolist(), block_q, block_k, 0.4, causal)
        )
        torch.testing.assert_close(kernel[b, h].double(), want.double(), atol=3e-6, rtol=1e-5)
        torch.testing.assert_close(plain[b, h].double(), want.double(), atol=3e-6, rtol=1e-5)


def test_large_logits_do_not_overflow():
    q, k = torch.full((1, 1, 40, 4), 100.0), torch.randn(1, 1, 70, 4) * 100
    found = kernels.block_mass(q, k, Call.of(q, k), 16, 32)
    assert found.isfinite().all() and abs(found.sum().item() - 40) < 1e-3


def test_every_row_gives_one():
    q, k = torch.randn(1, 2, 50, 8), torch.randn(1, 1, 90, 8)
    found = kernels.block_mass(q, k, Call.of(q, k), 16, 16)
    torch.testing.assert_close(found.sum(-1), torch.tensor([16.0, 16, 16, 2]).expand(1, 2, 4), atol=1e-5, rtol=0)
