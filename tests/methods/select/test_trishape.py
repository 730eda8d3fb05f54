"""What is true of tri-shape: an A, and rows at the end that read everything."""

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Full
from saccade.methods.select.trishape import TriShape


def tri(N, M, sink, recent, last):
    rows = []
    for row in range(N):
        i = M - N + row
        # the whole query block of 64 that any of the last queries stands in
        full = (row // 64 + 1) * 64 > N - last
        rows.append([j <= i and (full or j < sink or i - j < recent) for j in range(M)])
    return torch.tensor(rows)


SIZES = [(1, 1), (7, 7), (63, 63), (64, 64), (65, 65), (127, 127), (128, 128), (129, 129), (200, 200)]


@pytest.mark.parametrize(("N", "M"), [*SIZES, (1, 200), (150, 333)])
@pytest.mark.parametrize(("sink", "recent", "last"), [(0, 1, 1), (4, 16, 64), (30, 64, 65)])
def test_matches_loop(N, M, sink, recent, last):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, N, 8), torch.randn(1, 2, M, 8), torch.randn(1, 2, M, 8)
    call, method = Call.of(q, k), TriShape(sink=sink, recent=recent, last=last)
    want = tri(N, M, sink, recent, last)
    pattern = method.select(q, k, call)
    assert torch.equal(pattern.mask(call), want.expand(1, 4, N, M))
    assert pattern.pairs(call) == 4 * want.sum()
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=want, enable_gqa=True)
    torch.testing.assert_close(method.attend(q, k, v, call).o, o, atol=1e-5, rtol=1e-5)


def test_the_last_queries_are_dense_and_others_are_not():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 300, 8)
    call, method = Call.of(x, x), TriShape(sink=2, recent=8, last=40)
    mask = method.select(x, x, call).mask(call)[0, 0].sum(-1)
    assert mask[-44:].tolist() == list(range(257, 301))  # row 256 starts the last block of 64
    assert mask[20:256].tolist() == [10] * 236


def test_one_query_is_dense():
    x = torch.zeros(1, 1, 64, 2)
    assert isinstance(TriShape(last=64).select(x, x, Call.of(x, x)), Full)
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 999, 2)
    assert isinstance(TriShape().select(q, k, Call.of(q, k)), Full)


@pytest.mark.parametrize("args", [{"sink": -1}, {"recent": 0}, {"last": 0}, {"last": -64}, {"last": 1.0}])
def test_refuses(args):
    with pytest.raises(InputError, match="TriShape"):
        TriShape(**args)


def test_refuses_holes():
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2)
    call = Call.of(q, k, q_pos=torch.tensor([[9]]), k_pos=torch.tensor([[[0, 4, 9]]]))
    with pytest.raises(UnsupportedError, match="TriShape"):
        TriShape().select(q, k, call)
