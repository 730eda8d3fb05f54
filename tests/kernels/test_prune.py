"""prune against plain loops over one range at a time."""

import pytest
import torch

from saccade.core.errors import InputError
from saccade.core.rope import Rope
from saccade.kernels import prune as module
from saccade.kernels.prune import levels, prune


def descend(judges, low, high, key):
    """The best answer on the way down one range; key(slot, right) is the key as it is compared."""

    def answer(slot, right):
        return max(float(q @ key(slot, right)) for q in judges)

    if high - low == 1:
        return answer(low, True)
    best = -float("inf")
    while high - low > 1:
        middle = (low + high) // 2
        left, right = answer((low + middle) // 2, False), answer((middle + high) // 2, True)
        best = max(best, left, right)
        low, high = (middle, high) if right > left else (low, middle)
    return best


def naive(rows, k, low, size, stop, kept, key):
    """int lists [B][H][n] of first slots."""
    B, H, n = rows.shape[:3]
    share = H // k.shape[1]
    found = torch.full((B, H, n, kept), -1)
    for b in range(B):
        for h in range(H):
            for i in range(n):
                starts = [a for a in low[b, h, i].tolist() if 0 <= a < int(stop[i])]
                if low.shape[3] > kept:
                    scores = {
                        a: descend(
                            rows[b, h, i], a, min(a + size, int(stop[i])), key(b, h // share, low[b, h, i].tolist())
                        )
                        for a in starts
                    }
                    starts = sorted(starts, key=lambda a: -scores[a])[:kept]
                found[b, h, i, : len(starts)] = torch.tensor(sorted(starts))
    return found


@pytest.mark.parametrize("tile", [1, 1 << 22])
@pytest.mark.parametrize(("size", "kept"), [(1, 4), (2, 3), (7, 2), (8, 5), (16, 1), (8, 40)])
def test_against_loops(size, kept, tile, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile)
    B, H, G, n, R, D, M = 2, 4, 2, 3, 3, 6, 93
    rows, k = torch.randn(B, H, n, R, D).double(), torch.randn(B, G, M, D).double()
    # every query block has ranges of its own, some of them nothing
    starts = torch.arange(0, M, size)
    low = torch.stack(
        [starts[torch.randperm(len(starts))[: max(1, len(starts) * 2 // 3)].sort().values] for _ in range(B * H * n)]
    )
    low = torch.nn.functional.pad(low, (0, 2), value=-1).view(B, H, n, -1)
    stop = torch.tensor([0, 41, M])
    got = prune(rows, k, low, size, stop, kept)
    want = naive(rows, k, low, size, stop, kept, lambda b, g, _: lambda slot, right: k[b, g, slot])
    assert torch.equal(got, want)


@pytest.mark.parametrize("seed", range(5))
def test_moved_keys_are_compared_where_they_are_placed(seed):
    torch.manual_seed(seed)
    B, H, G, n, R, D, M, size = 1, 2, 1, 7, 1, 4, 64, 8
    rows, k = torch.randn(B, H, n, R, D).double(), torch.randn(B, G, M, D).double()
    # one key and the next one are far apart in angle
    rope = Rope(torch.tensor([2.0, 1.0], dtype=torch.float64))
    low = torch.arange(0, M, size).view(1, 1, 1, -1).expand(B, H, n, -1)
    # ranges that are cut off end in a single key sooner than others
    stop = torch.tensor([17, 19, 21, 22, 27, 29, 46])

    def halves(keys, slots, right):
        return rope(keys, (int(right) - slots).flatten(2))

    def numbers(keys, slots, right):
        return rope(keys, (torch.arange(low.shape[3]) - slots).flatten(2))

    def turned(slot, to):
        return rope(k[:, :, slot : slot + 1], torch.tensor([to - slot]))[0, 0, 0]

    by_half = naive(rows, k, low, size, stop, 2, lambda b, g, _: lambda slot, right: turned(slot, int(right)))
    by_number = naive(
        rows, k, low, size, stop, 2, lambda b, g, at: lambda slot, right: turned(slot, at.index(slot // size * size))
    )
    assert torch.equal(prune(rows, k, low, size, stop, 2, halves), by_half)
    assert torch.equal(prune(rows, k, low, size, stop, 2, numbers), by_number)
    plain = prune(rows, k, low, size, stop, 2)
    assert not torch.equal(by_half, plain) and not torch.equal(by_number, plain)


def test_a_bump_is_found_and_a_spike_only_where_it_is_met():
    M, size = 1024, 32
    place = torch.arange(M)
    low, stop = torch.arange(0, M, size).view(1, 1, 1, -1), torch.tensor([M])
    for centre in (100, 517, 900):
        bump = torch.exp(-(((place - centre) / size) ** 2)).view(1, 1, M, 1)
        assert prune(torch.ones(1, 1, 1, 1, 1), bump, low, size, stop, 1).item() == centre // size * size
    met = 0
    for slot in range(size):
        spike = torch.zeros(1, 1, M, 1)
        spike[0, 0, 96 + slot] = 1.0
        met += prune(torch.ones(1, 1, 1, 1, 1), spike, low, size, stop, 1).item() == 96
    # no answer says which half is better, so that of the way down the first slots only the probes are met
    assert 0 < met <= 2 * levels(size)


@pytest.mark.parametrize(("size", "kept"), [(0, 1), (1, 0)])
def test_bad_sizes(size, kept):
    with pytest.raises(InputError, match="prune"):
        prune(
            torch.ones(1, 1, 1, 1, 1),
            torch.ones(1, 1, 4, 1),
            torch.zeros(1, 1, 1, 1).long(),
            size,
            torch.tensor([4]),
            kept,
        )
