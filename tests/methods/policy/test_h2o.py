"""H2O against its definition, one token and one head at a time, and its claim against a window of equal size."""

import pytest
import torch

from saccade.cache.store import DRAFT
from saccade.core.errors import InputError
from saccade.methods.policy.duo import DuoAttention
from saccade.methods.policy.h2o import H2O
from saccade.testing import Feed, run, stream


def naive(sequence, pieces, heavy, recent):
    """Positions that each key head holds in the end: weights summed in dictionaries, evicted from the definition."""
    q, k = sequence.q[0, 0], sequence.k[0, 0]
    share = len(q) // len(k)
    held = [dict.fromkeys([], 0.0) for _ in k]
    start = 0
    for n in pieces:
        for g, mass in enumerate(held):
            mass.update((p, 0.0) for p in range(start, start + n))
            for i in range(start, start + n):
                seen = [p for p in mass if p <= i]
                for h in range(g * share, (g + 1) * share):
                    w = torch.softmax(torch.stack([q[h, i] @ k[g, p] for p in seen]) / q.shape[-1] ** 0.5, 0)
                    for p, weight in zip(seen, w.tolist(), strict=True):
                        mass[p] += weight / share
            newest = recent + DRAFT
            old = sorted(mass)[:-newest]
            for p in sorted(old, key=mass.get)[: max(0, len(mass) - heavy - newest)]:
                del mass[p]
        start += n
    return [sorted(mass) for mass in held]


def test_against_the_definition():
    pieces = [60, 1, 1, 9, 1, 1, 1]
    sequence = stream(sum(pieces), layers=1, D=6)
    feed = Feed(H2O(heavy=5, recent=4), layers=1)
    a = 0
    for n in pieces:
        feed(sequence.part(a, a + n))
        a += n
    feed.stores[0].settle()
    got = [row.tolist() for row in feed.stores[0].views()[0].pos[0]]
    assert got == naive(sequence, pieces, 5, 4)
    assert got[0] != got[1]


def heavy_hitters(seed):
    """A few early tokens that every query looks at, as in text; the rest is noise."""
    sequence = stream(700, layers=1, seed=seed)
    sequence.q[..., 0] = 2
    for at in (40, 111, 222, 333):
        sequence.k[..., at, 0] = 16
    return sequence


@pytest.mark.parametrize("seed", range(3))
def test_nearer_to_dense_than_a_window_of_equal_size(seed):
    sequence = heavy_hitters(seed)
    cut = [690, *[1] * 10]
    dense = run(DuoAttention(0, 1000), sequence, cut)[..., 691:, :]
    ours = run(H2O(heavy=40, recent=24), sequence, cut)[..., 691:, :]
    window = run(DuoAttention(sink=4, recent=60), sequence, cut)[..., 691:, :]
    assert (ours - dense).norm() < 0.6 * (window - dense).norm()


@pytest.mark.parametrize("bad", [{"heavy": 0}, {"recent": 0}, {"heavy": 1.5}, {"recent": True}])
def test_bad_sizes(bad):
    with pytest.raises(InputError, match="H2O"):
        H2O(**bad)
