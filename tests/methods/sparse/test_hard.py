"""Hard attention against queries one by one, the count of signs by bits, and a task where distractors are many."""

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.kernels.attend import attend
from saccade.methods.sparse import hard
from saccade.methods.sparse.hard import HardAttention


def rows(pattern, b, h):
    return [[s for s in line if s >= 0] for line in pattern.index[b, h].tolist()]


@pytest.mark.parametrize("tile", [1, 300, 1 << 22])
@pytest.mark.parametrize("candidates", [None, 9])
@pytest.mark.parametrize(("N", "M"), [(20, 20), (3, 31), (1, 40)])
def test_against_queries_one_by_one(N, M, candidates, tile, monkeypatch):
    monkeypatch.setattr(hard, "TILE", tile)
    q, k = torch.randn(2, 4, N, 70).double(), torch.randn(2, 2, M, 70).double()
    pattern = HardAttention(budget=5, candidates=candidates).select(q, k, Call.of(q, k))
    for b in range(2):
        for h in range(4):
            for i, got in enumerate(rows(pattern, b, h)):
                keys = k[b, h // 2, : M - N + i + 1]
                pool = range(len(keys))
                if candidates is not None and len(pool) > candidates:
                    agree = [
                        sum(bool(x > 0) == bool(y > 0) for x, y in zip(key, q[b, h, i], strict=True)) for key in keys
                    ]
                    line = sorted(agree, reverse=True)[candidates - 1]
                    sure = [j for j in pool if agree[j] > line]
                    edge = [j for j in pool if agree[j] == line]
                    # among equal counts at the edge any may come in
                    assert all(j in sure or j in edge for j in got)
                    pool = [*sure, *(j for j in got if j in edge)]
                best = sorted(pool, key=lambda j: -float(keys[j] @ q[b, h, i]))[: len(got)]
                assert len(got) == min(5, M - N + i + 1) and got == sorted(got)
                if candidates is None:
                    assert set(got) == set(best)
                else:
                    worst = min(float(keys[j] @ q[b, h, i]) for j in got)
                    assert all(float(keys[j] @ q[b, h, i]) <= worst for j in set(pool) - set(got))


def test_gives_the_others_exactly_nothing():
    q, k, v = torch.randn(3, 1, 1, 12, 6).unbind(0)
    call = Call.of(q, k)
    pattern = HardAttention(budget=3).select(q, k, call)
    before = attend(q, k, v, pattern, call).o
    left = set(range(12)) - {s for line in rows(pattern, 0, 0)[-1:] for s in line}
    v[:, :, list(left)] = 1e6
    assert torch.equal(attend(q, k, v, pattern, call).o[:, :, -1], before[:, :, -1])


@pytest.mark.parametrize("seed", range(3))
def test_signs_find_most_of_the_best_keys_and_far_more_than_chance(seed):
    rng = torch.Generator().manual_seed(seed)
    q, k = torch.randn(1, 1, 64, 64, generator=rng), torch.randn(1, 1, 1024, 64, generator=rng)
    exact = HardAttention(budget=16).select(q, k, Call.of(q, k))
    signs = HardAttention(budget=16, candidates=128).select(q, k, Call.of(q, k))
    shared = [len(set(a) & set(b)) / 16 for a, b in zip(rows(exact, 0, 0), rows(signs, 0, 0), strict=True)]
    assert sum(shared) / 64 > 4 * 128 / 1024


@pytest.mark.parametrize("seed", range(3))
def test_a_few_words_decide_and_many_distract(seed):
    """One key holds the answer, thousands each draw a little weight: dense attention drowns, the best few do not."""
    rng = torch.Generator().manual_seed(seed)
    N, D = 4096, 16
    k, v = torch.randn(1, 1, N, D, generator=rng), torch.randn(1, 1, N, 1, generator=rng) - 1.0
    q = torch.randn(1, 1, 1, D, generator=rng)
    k[0, 0, 77] = q[0, 0, 0] / q.norm() ** 2 * 24
    v[0, 0, 77] = 1.0
    call = Call.of(q, k)
    dense = attend(q, k, v, None, call).o.item()
    best = attend(q, k, v, HardAttention(budget=1).select(q, k, call), call).o.item()
    assert best == pytest.approx(1.0) and dense < 0.8


@pytest.mark.parametrize("bad", [{"budget": 0}, {"candidates": 0}, {"budget": 1.5}])
def test_bad_sizes(bad):
    with pytest.raises(InputError, match="HardAttention"):
        HardAttention(**bad)
