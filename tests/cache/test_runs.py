"""Blocks that stand side by side are read as slices: the same answer as from a list of them."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saccade.cache import runs as module
from saccade.cache.runs import attend_placed, runs
from saccade.cache.tier import Tier
from saccade.core.call import Call


def by_hand(q, k, v, at, block, scale):
    """Softmax over the tokens of each row's blocks, a query at a time, in float64."""
    R, h, N, _ = q.shape
    o, lse = torch.zeros(R, h, N, v.shape[3], dtype=torch.float64), torch.zeros(R, h, N, dtype=torch.float64)
    for r in range(R):
        slots = [p * block + i for p in at[r].tolist() if p >= 0 for i in range(block)]
        for head in range(h):
            for n in range(N):
                scores = k[0, 0, slots].double() @ q[r, head, n].double() * scale
                lse[r, head, n] = scores.logsumexp(0)
                o[r, head, n] = scores.softmax(0) @ v[0, 0, slots].double()
    return o, lse


@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize(
    "places",
    [
        pytest.param([[*range(200)], [*range(200, 400)]], id="one run"),
        pytest.param([[3, 5, *range(20, 190), 300], [4, 7, *range(200, 370), 399]], id="a run among single blocks"),
        pytest.param([[*range(150), *range(160, 300)], [*range(10, 160), *range(250, 390)]], id="two runs"),
        pytest.param([[-1, *range(180)], [-1, *range(20, 200)]], id="a block missing beside place 0"),
        pytest.param([[2, 4, 9], [0, 1, 2]], id="no run"),
        pytest.param([[*range(180)], [*range(0, 360, 2)]], id="a run in one row only"),
    ],
)
def test_the_same_as_by_hand(places, queries):
    block, width = 8, 20
    store = torch.randn(1, 1, 400 * block, width + 12)
    # as in the cache: keys and values side by side
    k, v = store[..., :width], store[..., width:]
    q = torch.randn(2, 3, queries, width)
    at = torch.tensor(places)
    call = Call.of(q, k.expand(2, -1, -1, -1), scale=0.3)
    out = attend_placed(q, k, v, at, block, call)
    o, lse = by_hand(q, k, v, at, block, 0.3)
    torch.testing.assert_close(out.o.double(), o, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(out.lse.double(), lse, atol=2e-6, rtol=1e-5)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(-1, 6), st.integers(-1, 6)), max_size=12), st.integers(1, 4))
@example([(-1, -1), (0, 0), (1, 1)], 2)
def test_runs_are_the_longest_there_are(pairs, least):
    at = torch.tensor(pairs, dtype=torch.long).view(-1, 2).T
    found = runs(at, least)
    K = at.shape[1]

    def follows(a, b):
        whole = all(int(at[r, c]) >= 0 for r in range(2) for c in range(a, b))
        return whole and all(int(at[r, c + 1]) == int(at[r, c]) + 1 for r in range(2) for c in range(a, b - 1))

    spans = [(a, b) for a in range(K) for b in range(a + 1, K + 1) if follows(a, b)]
    longest = [(a, b) for a, b in spans if not any(c <= a and b <= d and (c, d) != (a, b) for c, d in spans)]
    assert found == [(a, b) for a, b in longest if b - a >= least]


def test_reading_everything_copies_no_keys(monkeypatch):
    seen = []
    real = module.attend
    monkeypatch.setattr(module, "attend", lambda q, k, v, *rest: seen.append((k, rest[0])) or real(q, k, v, *rest))
    tier = Tier(block=16, budget=1 << 24)
    k, v = torch.randn(1, 2, 2048, 8), torch.randn(1, 2, 2048, 8)
    tier.append(k, v)
    keys, values, at = tier.place(torch.arange(128).expand(1, 2, -1))
    q = torch.randn(2, 2, 1, 8)
    out = attend_placed(q, keys, values, at[0], 16, Call.of(q, k[0][:, None]))
    base = tier.near.data.untyped_storage().data_ptr()
    assert [(kept.untyped_storage().data_ptr(), pattern) for kept, pattern in seen] == [(base, None)] * 2
    want = torch.softmax(q.double() @ k[0][:, None].double().mT / math.sqrt(8), -1) @ v[0][:, None].double()
    torch.testing.assert_close(out.o.double(), want, atol=2e-6, rtol=1e-5)
