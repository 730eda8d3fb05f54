"""HiP's tree search against plain lists, when it must be exact, and the assumption that it stands on."""

import math

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, PlanError
from saccade.core.pattern import Blocks, Full, Window
from saccade.core.table import build
from saccade.kernels import tree
from saccade.kernels.tree import tree_search
from saccade.methods.select import hip
from saccade.methods.select.hip import HiP
from saccade.testing import Feed, stream


def search(judges, keys, start, stop, kept, block):
    """The same search on lists: ranges are halved until each is one block."""

    def value(at):
        near = keys[at * block : (at + 1) * block]
        return max(float(q @ k) for q in judges for k in near)

    count = max(0, stop - start)
    ranges = [(start + count * g // kept, start + count * (g + 1) // kept) for g in range(kept)]
    ranges = [r for r in ranges if r[1] > r[0]]
    while any(b - a > 1 for a, b in ranges):
        halves = []
        for a, b in ranges:
            middle = a + (b - a) // 2
            halves += [(a, middle), (middle, b)]
        halves = [r for r in halves if r[1] > r[0]]
        ranges = sorted(halves, key=lambda r: -value(r[0]))[:kept]
    return sorted(a for a, _ in ranges)


@pytest.mark.parametrize("tile", [1, 1 << 24])
@pytest.mark.parametrize(("kept", "block", "start"), [(3, 4, 0), (5, 2, 1), (4, 3, 2), (1, 8, 0), (40, 2, 0)])
def test_against_lists(kept, block, start, tile, monkeypatch):
    monkeypatch.setattr(tree, "TILE", tile)
    B, H, G, n, R, D, M = 2, 4, 2, 5, 3, 6, 71
    rows, k = torch.randn(B, H, n, R, D).double(), torch.randn(B, G, M, D).double()
    stop = torch.tensor([0, 1, 7, 15, -(-M // block)]).clamp(max=-(-M // block))
    got = tree_search(rows, k, start, stop, kept, block)
    for b in range(B):
        for h in range(H):
            for i in range(n):
                line = got[b, h, i]
                want = search(rows[b, h, i], k[b, h // 2], start, int(stop[i]), kept, block)
                assert line[line >= 0].tolist() == want
                assert (line[len(want) :] == -1).all()


def test_exact_where_scores_rise_along_the_keys():
    k = torch.arange(512.0).view(1, 1, 512, 1)
    got = tree_search(torch.ones(1, 1, 1, 1, 1), k, 0, torch.tensor([64]), 9, 8)
    assert got.flatten().tolist() == [*range(55, 64)]


def test_one_round_is_the_exact_choice_of_blocks():
    k = torch.randn(1, 1, 64, 8)
    rows = torch.randn(1, 1, 1, 4, 8)
    got = tree_search(rows, k, 0, torch.tensor([16]), 8, 4)
    best = (rows[0, 0, 0] @ k[0, 0].T).amax(0).view(16, 4).amax(1).topk(8).indices.sort().values
    assert got.flatten().tolist() == best.tolist()


@pytest.mark.parametrize(("N", "M"), [(200, 200), (130, 307), (65, 400)])
def test_reads_first_and_near_tokens_and_never_beyond_the_query_block(N, M):
    method = HiP(budget=80, sink=5, window=20, block_q=32, block_k=4, refresh=1, first=0)
    q, k = torch.randn(1, 4, N, 8), torch.randn(1, 2, M, 8)
    call = Call.of(q, k)
    window, blocks = method.select(q, k, call).parts
    assert window == Window(5, 20) and isinstance(blocks, Blocks)
    kept = (80 - 5 - 20) // 4
    for at, line in enumerate(blocks.index[0, 3].tolist()):
        last = M - N + min((at + 1) * 32, N)
        real = [i for i in line if i >= 0]
        assert real == sorted(set(real)) and len(real) == min(kept, max(0, -(-(last - 20) // 4) - 1))
        assert all(5 // 4 <= i <= (last - 20) // 4 for i in real)


def test_a_search_is_used_until_the_next_multiple_of_refresh(monkeypatch):
    made = []
    monkeypatch.setattr(
        hip, "tree_search", lambda rows, k, *rest: made.append(k.shape[2]) or tree_search(rows, k, *rest)
    )
    method = HiP(budget=60, sink=3, window=9, block_k=4, refresh=4, first=0)
    sequence, feed = stream(220, layers=1), Feed(method, layers=1)
    feed(sequence.part(0, 190))
    made.clear()
    a = 190
    for n in (1, 1, 3, 1, 6):
        feed(sequence.part(a, a + n))
        a += n
    # the first token searches at once, then those at multiples of 4
    assert [m - 1 for m in made] == [190, 192, 196, 200]


def smooth(seed, N=4096, D=32, walk=0.05):
    """Keys along a slow random walk on a sphere: neighbours are alike. Queries look for a place on it."""
    rng = torch.Generator().manual_seed(seed)
    k = torch.randn(1, 1, D, generator=rng) + walk * torch.randn(1, N, D, generator=rng).cumsum(1)
    k = k / k.norm(dim=-1, keepdim=True) * D**0.5
    at = torch.randint(0, N - 600, (16,), generator=rng)
    q = k[:, at] * 3
    return q[None], k[None], at


def kept_mass(index, q, k, block):
    weights = torch.softmax(q[0, 0] @ k[0, 0].T / q.shape[-1] ** 0.5, -1)
    blocks = weights.view(len(weights), -1, block).sum(-1)
    return float(blocks.gather(1, index.long()).sum(1).mean())


@pytest.mark.parametrize("seed", range(2))
def test_finds_most_of_the_mass_where_neighbours_are_alike_and_little_where_they_are_not(seed):
    kept, block = 16, 8
    q, k, _ = smooth(seed)
    stop = torch.full((16,), 512)
    found = tree_search(q[:, :, :, None], k, 0, stop, kept, block)[0, 0]
    rng = torch.Generator().manual_seed(seed)
    chance = torch.stack([torch.randperm(512, generator=rng)[:kept] for _ in range(16)])
    window = torch.arange(512 - kept, 512).expand(16, -1)
    best = kept_mass(
        torch.softmax(q[0, 0] @ k[0, 0].T / 32**0.5, -1).view(16, 512, 8).sum(-1).topk(kept).indices, q, k, block
    )
    ours = kept_mass(found, q, k, block)
    assert ours > 0.6 * best and ours > 5 * kept_mass(chance, q, k, block) and ours > 5 * kept_mass(window, q, k, block)
    # the assumption: the same keys in no order
    mixed = k[:, :, torch.randperm(4096, generator=rng)]
    found = tree_search(q[:, :, :, None], mixed, 0, stop, kept, block)[0, 0]
    assert kept_mass(found, q, mixed, block) < 0.5 * ours


def test_early_layers_and_small_contexts_are_dense():
    q, k = torch.randn(1, 2, 400, 8), torch.randn(1, 1, 400, 8)
    method = HiP(budget=256, first=2)
    assert method.select(q, k, Call.of(q, k, layer=1)) == Full()
    assert method.select(q, k, Call.of(q, k, layer=2)) != Full()
    assert method.select(q[:, :, :256], k[:, :, :256], Call.of(q[:, :, :256], k[:, :, :256], layer=2)) == Full()
    assert method.estimate(Call.of(q, k, layer=1)) == 0 < method.estimate(Call.of(q, k, layer=2))


def test_looks_at_few_keys():
    q = k = torch.zeros(1, 1, 1, 8).expand(1, 1, 1 << 15, 8)
    looked = HiP(budget=1024).estimate(Call.of(q, k, layer=9)) / (2**15 * 2**15 / 2)
    assert looked < 2 * (1 + math.log2(2**15 / 1024)) * 1024 / 2**15 / 2 * 1.1


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"budget": 0}, "budget"),
        ({"budget": 150}, "no block"),
        ({"refresh": 0}, "refresh"),
        ({"block_k": 0}, "block_k"),
    ],
)
def test_bad_arguments(bad, word):
    with pytest.raises((InputError, PlanError), match=word):
        build("hip", bad)
