"""What is true of streaming: sinks and a window, at the positions that tokens have in the sequence."""

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Window
from saccade.methods.select.streaming import Streaming


def a_shape(N, M, sink, recent):
    """Query i reads j < sink and 0 <= i-j < recent."""
    return torch.tensor(
        [[j <= i and (j < sink or i - j < recent) for j in range(M)] for i in range(M - N, M)], dtype=torch.bool
    )


def test_by_hand():
    q = torch.zeros(1, 1, 7, 2)
    mask = Streaming(sink=2, recent=3).select(q, q, Call.of(q, q)).mask(Call.of(q, q))
    assert mask[0, 0, 6].nonzero().flatten().tolist() == [0, 1, 4, 5, 6]


@pytest.mark.parametrize(("N", "M"), [(1, 1), (7, 7), (63, 63), (64, 64), (65, 65), (129, 129), (1, 200), (33, 200)])
@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (4, 16), (30, 64), (300, 300)])
def test_matches_paper_loop(N, M, sink, recent):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, N, 8), torch.randn(1, 2, M, 8), torch.randn(1, 2, M, 8)
    call, method = Call.of(q, k), Streaming(sink=sink, recent=recent)
    want = a_shape(N, M, sink, recent)
    assert torch.equal(method.select(q, k, call).mask(call), want.expand(1, 4, N, M))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=want, enable_gqa=True)
    torch.testing.assert_close(method.attend(q, k, v, call).o, o, atol=1e-5, rtol=1e-5)


def test_chunks_equal_one_shot_and_one_token_at_a_time():
    torch.manual_seed(0)
    method, x = Streaming(sink=3, recent=9), torch.randn(1, 2, 50, 8)
    whole = method.attend(x, x, x, Call.of(x, x)).o
    parts = []
    for a, b in [(0, 13), (13, 30), *((i, i + 1) for i in range(30, 50))]:
        q, k = x[:, :, a:b], x[:, :, :b]
        parts.append(method.attend(q, k, k, Call.of(q, k)).o)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=1e-5)


def test_holes_in_the_store_are_read_by_position():
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4, 2)
    call = Call.of(q, k, q_pos=torch.tensor([[20]]), k_pos=torch.tensor([[[0, 7, 18, 20]]]))
    assert Streaming(sink=2, recent=3).select(q, k, call).mask(call).flatten().tolist() == [True, False, True, True]


def test_the_paper_sizes():
    q = torch.zeros(1, 1, 4, 2)
    assert Streaming().select(q, q, Call.of(q, q)) == Window(128, 3968)


@pytest.mark.parametrize("args", [{"sink": -1}, {"recent": 0}, {"recent": -5}, {"recent": 2.5}, {"sink": True}])
def test_refuses(args):
    with pytest.raises(InputError, match="Streaming"):
        Streaming(**args)
