"""H2O against its definition, one token and one head at a time, and its claim against a window of equal size."""

import pytest
import torch

from saccade.cache.store import DRAFT
from saccade.core.errors import InputError
from saccade.kernels.mass import key_mass
from saccade.methods.policy.duo import DuoAttention
from saccade.methods.policy.h2o import H2O
from saccade.methods.policy.snapkv import SnapKV
from saccade.testing import Feed, run, stream


def naive(sequence, pieces, heavy, recent):
    """Positions that each key head holds in the end: weights summed in dictionaries, evicted from the definition.

    A piece below 0 takes so many tokens back; the tokens after it are the next ones of the sequence.
    """
    q, k = sequence.q[0, 0], sequence.k[0, 0]
    share = len(q) // len(k)
    held = [dict.fromkeys([], 0.0) for _ in k]
    start = 0
    for n in pieces:
        if n < 0:
            start += n
            q, k = (torch.cat((t[:, :start], t[:, start - n :]), 1) for t in (q, k))
            held = [{p: weight for p, weight in mass.items() if p < start} for mass in held]
            continue
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


# the last three: nothing dropped yet, a draft within a prompt, and more than the last call brought
@pytest.mark.parametrize("pieces", [[60, 1, 1, 9, 1, 1, 1], [24, -14, 40, 1], [60, -9, 1, 1], [20, 3, -4, 9, 1]])
def test_against_the_definition(pieces):
    sequence = stream(sum(n for n in pieces if n > 0), layers=1, D=6)
    feed = Feed(H2O(heavy=5, recent=4), layers=1)
    a = 0
    for n in pieces:
        if n < 0:
            feed.crop(-n)
            continue
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


@pytest.mark.parametrize("policy", [H2O(heavy=5, recent=4), SnapKV(capacity=30, window=7, slack=3)])
def test_what_voting_costs_is_counted(policy, monkeypatch):
    counted = []

    def counting(q, k, call):
        q_pos, k_pos = call.positions()
        pairs = call.sees(q_pos[:, None, :, None], k_pos[:, :, None]).expand(1, 2, -1, -1)
        counted.append(2 * int(pairs.sum()))
        return key_mass(q, k, call)

    monkeypatch.setattr(f"{type(policy).__module__}.key_mass", counting)
    sequence, feed = stream(90, layers=1), Feed(policy, layers=1)
    for a, b in [(0, 60), (60, 61), (61, 62), (62, 75), *((i, i + 1) for i in range(75, 90))]:
        feed(sequence.part(a, b))
    feed.stores[0].settle()
    told = [look.seen.estimate for look in feed.looks]
    assert [pairs for pairs in told if pairs] == counted and len(counted) > 3


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
