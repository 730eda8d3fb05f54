"""MoA's spans by hand, as in the paper's code, and what a head then sees and keeps."""

import pytest
import torch

from saccade import Assign, Plan
from saccade.cache.store import DRAFT
from saccade.core.errors import InputError
from saccade.core.pattern import Window
from saccade.core.plan import ModelShape
from saccade.methods.policy.moa import MoA
from saccade.testing import Feed, run, stream


@pytest.mark.parametrize(
    ("alpha", "beta", "length", "size"),
    [
        (-1024, 0.5, 4096, 1024),
        (-1024, 0.5, 2048, 128),
        (0, 1.0, 1000, 1024),
        (100, 0.0, 9999, 128),
        (0, 0.5, 1001, 512),
    ],
)
def test_sizes_by_hand(alpha, beta, length, size):
    assign = Assign(None, "moa", {"span": {"base": alpha, "slope": beta}}, phase="cache")
    plan = Plan.from_json(Plan(ModelShape(1, 2, 2), ((assign,),)).to_json())
    method = plan.phase(0, "cache")[0].build(length)
    assert method.size == size and method.pattern(None) == Window(64, size - 64)


def test_holds_the_first_and_the_newest():
    feed, sequence = Feed(MoA(span=40, sink=8, least=1, block=8), layers=1), stream(300, layers=1)
    for a, b in ((0, 200), (200, 201), (201, 230), (230, 300)):
        feed(sequence.part(a, b))
    feed.stores[0].settle()
    assert feed.stores[0].views()[0].pos[0, 0].tolist() == [*range(8), *range(300 - 32 - DRAFT, 300)]


def test_a_span_of_everything_is_dense():
    sequence = stream(90)
    q, k, v = (t.squeeze(1) for t in sequence[:3])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(run(MoA(span=200), sequence, [80, 10])[0], want)


@pytest.mark.parametrize(
    "bad", [{"span": 0}, {"span": 10, "least": 1, "block": 1, "sink": 10}, {"span": 9, "block": 0}]
)
def test_bad_sizes(bad):
    with pytest.raises(InputError, match="MoA"):
        MoA(**bad)
