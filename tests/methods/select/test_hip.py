"""HiP's tree search against plain lists, when it must be exact, and the assumption that it stands on."""

import math

import pytest
import torch
from smooth_keys import kept_mass, smooth

from saccade.core.call import Call
from saccade.core.errors import InputError, PlanError
from saccade.core.pattern import Blocks, Full, Window
from saccade.core.table import build
from saccade.kernels import tree
from saccade.kernels.tree import tree_search
from saccade.kernels.tree_step import tree_step
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
    monkeypatch.setattr(hip, "tree_step", lambda q, k, *rest: made.append(k.shape[2]) or tree_step(q, k, *rest))
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


@pytest.mark.parametrize("drafted", [1, 2, 15])
def test_tokens_that_were_taken_back_leave_no_trace(drafted):
    method = HiP(budget=60, sink=3, window=9, block_k=4, refresh=4, first=0)
    sequence, draft = stream(210), stream(210, seed=1)
    feed, want = Feed(method), Feed(method)
    for each in (feed, want):
        # a search is made at 180 and at 184, none is due at 185
        each(sequence.part(0, 180))
        each(sequence.part(180, 185))
    feed(draft.part(185, 185 + drafted))
    feed.crop(drafted)
    torch.testing.assert_close(feed(sequence.part(185, 187)), want(sequence.part(185, 187)))


def test_a_step_of_period_one_searches_as_a_prompt_of_single_rows():
    method = HiP(budget=60, sink=3, window=9, block_q=1, block_k=4, refresh=1, first=0)
    q, k, memory = torch.randn(1, 2, 20, 8), torch.randn(1, 1, 220, 8), {}
    whole = method.select(q, k, Call.of(q, k)).parts[1].index
    for i in range(20):
        mine, keys = q[:, :, i, None], k[:, :, : 201 + i]
        got = method.select(mine, keys, Call.of(mine, keys, memory=memory)).parts[1].index
        assert torch.equal(got[:, :, 0], whole[:, :, i])


@pytest.mark.parametrize(("N", "stride"), [(96, 32), (70, 32), (64, 100), (70, 5)])
def test_the_last_row_of_a_query_block_is_asked(N, stride):
    method = HiP(budget=80, sink=5, window=20, block_q=32, block_k=4, stride=stride, refresh=1, first=0)
    q, k = torch.randn(1, 1, N, 8), torch.randn(1, 1, 300, 8)
    index = method.select(q, k, Call.of(q, k)).parts[1].index[0, 0]
    for i in range(-(-N // 32)):
        rows = [min(r, N - 1) for r in range(i * 32 + 31 % stride, i * 32 + 32, stride)]
        assert rows[-1] == min(i * 32 + 31, N - 1)
        last = 300 - N + min((i + 1) * 32, N)
        want = search(q[0, 0, rows], k[0, 0], 1, -(-(last - 20) // 4), 13, 4)
        assert index[i][index[i] >= 0].tolist() == want


@pytest.mark.parametrize("seed", range(2))
def test_finds_most_of_the_mass_where_neighbours_are_alike_and_little_where_they_are_not(seed):
    """8192 keys of width 64, 512 of them kept: against the best blocks, blocks by lot, and a window of as many keys."""
    kept, block, count = 64, 8, 1024
    q, k = smooth(seed)
    stop = torch.full((16,), count)
    found = tree_search(q[:, :, :, None], k, 0, stop, kept, block)[0, 0]
    rng = torch.Generator().manual_seed(seed)
    chance = torch.stack([torch.randperm(count, generator=rng)[:kept] for _ in range(16)])
    window = torch.arange(count - kept, count).expand(16, -1)
    weights = torch.softmax(q[0, 0] @ k[0, 0].T / 8, -1)
    best = kept_mass(weights.view(16, count, block).sum(-1).topk(kept).indices, q, k, block)
    ours = kept_mass(found, q, k, block)
    assert ours > 0.6 * best and ours > 4 * kept_mass(chance, q, k, block) and ours > 4 * kept_mass(window, q, k, block)
    # the assumption: white noise, keys that are alike to nothing near them
    noise = torch.randn(1, 1, 8192, 64, generator=rng)
    asked = 0.5 * torch.randn(1, 1, 16, 64, generator=rng)
    found = tree_search(asked[:, :, :, None], noise, 0, stop, kept, block)[0, 0]
    assert kept_mass(found, asked, noise, block) < 0.5 * ours
    assert kept_mass(found, asked, noise, block) < 1.5 * kept_mass(chance, asked, noise, block)


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
