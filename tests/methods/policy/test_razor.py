"""RazorAttention's compensation token: its formula by hand, when it is exact, and what it brings."""

import math

import pytest
import torch

from saccade.cache.store import DRAFT
from saccade.core.errors import InputError
from saccade.kernels.attend import attend
from saccade.methods.policy.razor import RazorAttention
from saccade.testing import Feed, run, stream


def dense(sequence):
    q, k, v = (t.squeeze(1) for t in sequence[:3])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_a_token_that_stands_for_ten_weighs_as_ten():
    # q·k = 0 everywhere: the mean of ten dropped values counts ten times beside two kept ones
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4)
    v = torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 3, 1)
    bias = torch.tensor([math.log(10), 0.0, 0.0]).view(1, 1, 3)
    assert attend(q, k, v, key_bias=bias).o.item() == pytest.approx(10 / 12)


def test_exact_while_what_is_dropped_is_alike():
    sequence = stream(200)
    for t in (sequence.k, sequence.v):
        # all that will ever be dropped is one token many times over
        t[..., 3:180, :] = t[..., 3:4, :].clone()
    got = run(RazorAttention(sink=3, least=5, ratio=50, slack=0), sequence, [150, 3, *[1] * 47])
    # the count's logarithm is held in float32
    torch.testing.assert_close(got[0], dense(sequence), atol=1e-6, rtol=1e-6)


def test_not_exact_without_the_weight_of_the_count():
    sequence = stream(200)
    for t in (sequence.k, sequence.v):
        t[..., 3:180, :] = t[..., 3:4, :].clone()
    feed = Feed(RazorAttention(sink=3, least=5, ratio=50, slack=0))
    feed(sequence.part(0, 150))
    for store in feed.stores:
        assert store.groups[0].bias[0, 0, 3] == pytest.approx(math.log(150 - 3 - 5 - DRAFT))
        store.groups[0].bias.zero_()
    got = feed(sequence.part(150, 153))
    assert not torch.allclose(got[0], dense(sequence)[..., 150:153, :], atol=1e-3)


def test_the_buffer_grows_with_the_sequence():
    razor = RazorAttention(sink=2, least=10, ratio=4, slack=0)
    assert [razor.claim(n) for n in (20, 29, 40, 400)] == [20, 29, 2 + 1 + 10 + DRAFT, 2 + 1 + 100 + DRAFT]
    feed = Feed(razor, layers=1)
    sequence = stream(400, layers=1)
    feed(sequence.part(0, 400))
    pos = feed.stores[0].views()[0].pos[0, 0].tolist()
    # the compensation token stands where the last of the dropped ones stood
    assert pos == [0, 1, 400 - 100 - DRAFT - 1, *range(400 - 100 - DRAFT, 400)]


@pytest.mark.parametrize("seed", range(3))
def test_compensation_is_nearer_to_dense_than_dropping(seed):
    sequence, cut = stream(600, seed=seed), [590, *[1] * 10]
    # a head that does not retrieve looks at nothing in particular
    sequence.q.mul_(0.4)
    want = dense(sequence)[..., 591:, :]
    errors = []
    for compensate in (True, False):
        razor = RazorAttention(sink=4, least=32, ratio=60, slack=0, compensate=compensate)
        errors.append((run(razor, sequence, cut)[0][..., 591:, :] - want).norm())
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("bad", [{"least": 0}, {"ratio": 0}, {"sink": -1}, {"slack": 2.0}])
def test_bad_sizes(bad):
    with pytest.raises(InputError, match="RazorAttention"):
        RazorAttention(**bad)
