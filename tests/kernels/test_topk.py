"""top_blocks and top_tokens against a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.call import Call
from saccade.kernels.topk import top_blocks, top_tokens

NEG, POS = float("-inf"), float("inf")


def call_of(N, M, H=2, G=1, **fields):
    return Call.of(torch.zeros(1, H, N, 2), torch.zeros(1, G, M, 2), **fields)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(0, 30), st.sampled_from([1, 4, 7]), st.sampled_from([1, 3, 8]), st.integers(1, 9)
)
def test_blocks_match_the_loop(N, past, block_q, block_k, count):
    M = N + past
    nq, nk = -(-N // block_q), -(-M // block_k)
    scores = torch.randn(1, 2, nq, nk, generator=torch.Generator().manual_seed(N * 31 + past))
    for causal in (True, False):
        got = top_blocks(scores, count, block_q, block_k, call_of(N, M, causal=causal))
        assert got.index.dtype == torch.int32 and got.index.shape == (1, 2, nq, min(count, nk))
        for h in range(2):
            for i in range(nq):
                last = past + min(N, (i + 1) * block_q) - 1
                legal = [j for j in range(nk) if not causal or j * block_k <= last]
                want = sorted(sorted(legal, key=lambda j: -scores[0, h, i, j].item())[:count])
                line = got.index[0, h, i].tolist()
                assert line == want + [-1] * (len(line) - len(want))


def test_infinities_force_and_exclude():
    scores = torch.tensor([5.0, NEG, 1.0, POS, 4.0]).view(1, 1, 1, 5)
    call = call_of(1, 5, H=1)
    assert top_blocks(scores, 2, 1, 1, call).index.flatten().tolist() == [0, 3]
    assert top_blocks(scores, 5, 1, 1, call).index.flatten().tolist() == [0, 2, 3, 4, -1]


def test_scores_are_not_written_to():
    scores = torch.zeros(1, 1, 3, 3)
    top_blocks(scores, 1, 1, 1, call_of(3, 3, H=1))
    assert not scores.any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 20), st.integers(1, 30), st.sampled_from([(4, 2), (4, 1), (3, 3)]))
def test_tokens_match_the_loop(N, past, count, heads):
    (H, G), M = heads, N + past
    rng = torch.Generator().manual_seed(N * 31 + past)
    q, k = torch.randn(2, H, N, 4, generator=rng), torch.randn(2, G, M, 4, generator=rng)
    for causal in (True, False):
        got = top_tokens(q, k, count, Call.of(q, k, causal=causal)).index
        assert got.shape == (2, H, N, min(count, M)) and got.dtype == torch.int32
        for b in range(2):
            for h in range(H):
                for i in range(N):
                    legal = range(past + i + 1 if causal else M)
                    dots = {j: (q[b, h, i] @ k[b, h * G // H, j]).item() for j in legal}
                    want = set(sorted(dots, key=lambda j: -dots[j])[:count])
                    line = got[b, h, i].tolist()
                    assert {j for j in line if j >= 0} == want
                    assert line.count(-1) == len(line) - len(want)


def test_tokens_are_slots_of_what_is_real():
    q, k = torch.ones(1, 1, 2, 1), torch.tensor([9.0, 8.0, 7.0, 6.0]).view(1, 1, 4, 1)
    call = Call.of(q, k, q_pos=torch.tensor([[12, -1]]), k_pos=torch.tensor([[[-1, 4, 13, 11]]]))
    assert top_tokens(q, k, 3, call).index.tolist() == [[[[1, 3, -1], [-1, -1, -1]]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    q, k = torch.ones(1, 2, 1, 4, dtype=dtype), torch.arange(6, dtype=dtype).view(1, 1, 6, 1).expand(1, 1, 6, 4)
    assert top_tokens(q, k, 2, Call.of(q, k)).index.tolist() == [[[[5, 4]], [[5, 4]]]]
