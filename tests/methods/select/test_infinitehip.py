"""InfiniteHiP's stages against loops written from the paper, their periods, and the assumption that they stand on."""

import pytest
import torch
from smooth_keys import kept_mass, smooth

from saccade.core.call import Call
from saccade.core.errors import InputError, PlanError
from saccade.core.pattern import Blocks, Full, Window
from saccade.core.plan import ModelShape, Plan
from saccade.core.table import build
from saccade.kernels import prune as kernel
from saccade.methods.select import infinitehip
from saccade.methods.select.infinitehip import InfiniteHiP
from saccade.testing import Feed, stream

SMALL = dict(sink=6, window=10, chunks=(16, 8, 4), keep=(48, 32), strides=(4, 2, 1), block_q=8, first=0)


def descend(judges, keys, low, high):
    """The best answer on the way down to one key."""

    def answer(slot):
        return max(float(q @ keys[slot]) for q in judges)

    if high - low == 1:
        return answer(low)
    best = -float("inf")
    while high - low > 1:
        middle = (low + high) // 2
        left, right = answer((low + middle) // 2), answer((middle + high) // 2)
        best = max(best, left, right)
        low, high = (middle, high) if right > left else (low, middle)
    return best


def search(method, rows, keys, last, kept):
    """Blocks of one query block: rows [R,D], keys [M,D], tokens that its last row sees."""
    start = method.sink // method.chunks[-1] * method.chunks[-1]
    stop = last - method.window
    starts = list(range(start, stop, method.chunks[0]))
    for i, size in enumerate(method.chunks):
        if i:
            starts = [a + j for a in starts for j in range(0, method.chunks[i - 1], size) if a + j < stop]
        keeps = kept if i == len(method.keep) else -(-max(method.keep[i], kept * method.chunks[-1]) // size)
        judges = rows if len(rows) == 1 else rows.unflatten(0, (-1, method.strides[i])).mean(1)
        if len(starts) > keeps:
            scores = {a: descend(judges, keys, a, min(a + size, stop)) for a in starts}
            starts = sorted(sorted(starts, key=lambda a: -scores[a])[:keeps])
    return [a // method.chunks[-1] for a in starts]


@pytest.mark.parametrize(("N", "M"), [(200, 200), (61, 307), (24, 180)])
@pytest.mark.parametrize("over", [{}, {"chunks": (8, 4), "keep": (64,), "strides": (1, 8), "sink": 0}, {"sink": 3}])
def test_prefill_against_loops(N, M, over):
    method = InfiniteHiP(budget=70, **{"refresh": (4, 2, 1)[: len(over.get("chunks", "123"))], **SMALL, **over})
    q, k = torch.randn(1, 4, N, 8).double(), torch.randn(1, 2, M, 8).double()
    window, blocks = method.select(q, k, Call.of(q, k)).parts
    assert window == Window(method.sink, method.window) and isinstance(blocks, Blocks)
    kept = (70 - method.sink - method.window - 3) // 4
    assert blocks.index.shape == (1, 4, -(-N // 8), kept) and (blocks.block_q, blocks.block_k) == (8, 4)
    for h in (0, 3):
        for i, line in enumerate(blocks.index[0, h].tolist()):
            rows = [min(r, N - 1) for r in range(i * 8, i * 8 + 8)]
            want = search(method, q[0, h, rows], k[0, h // 2], M - N + rows[-1] + 1, kept)
            assert line == [*want, *[-1] * (kept - len(want))]


def test_one_stage_of_single_keys_is_the_exact_choice_of_keys():
    method = InfiniteHiP(40, 0, 8, chunks=(1,), keep=(), strides=(1,), refresh=(1,), block_q=1, first=0)
    q, k = torch.randn(1, 1, 30, 8).double(), torch.randn(1, 1, 130, 8).double()
    index = method.select(q, k, Call.of(q, k)).parts[1].index
    for row in range(30):
        best = (k[0, 0, : 101 + row - 8] @ q[0, 0, row]).topk(32).indices.sort().values
        assert index[0, 0, row].tolist() == best.tolist()


def test_each_stage_is_made_at_its_own_period_with_all_after_it(monkeypatch):
    made = []

    def spy(rows, k, low, size, stop, *rest):
        made.append((int(stop[0]) + 10 - 1, size))
        return kernel.prune(rows, k, low, size, stop, *rest)

    monkeypatch.setattr(infinitehip, "prune", spy)
    method = InfiniteHiP(budget=70, refresh=(12, 6, 2), **SMALL)
    sequence, feed = stream(230, layers=1), Feed(method, layers=1)
    feed(sequence.part(0, 191))
    made.clear()
    a = 191
    for n in (1, 1, 3, 1, 9):
        feed(sequence.part(a, a + n))
        a += n
    # the first token makes all stages; then 192 = 16 * 12, 198 = 33 * 6, 204 = 17 * 12, even ones the last stage
    want = [(191, 16), (191, 8), (191, 4), (192, 16), (192, 8), (192, 4), (194, 4), (196, 4), (198, 8), (198, 4)]
    want += [(200, 4), (202, 4), (204, 16), (204, 8), (204, 4)]
    assert made == want


def test_with_periods_of_one_every_step_is_a_search_of_its_own():
    method = InfiniteHiP(budget=70, refresh=(1, 1, 1), **SMALL)
    q, k = torch.randn(1, 2, 20, 8), torch.randn(1, 1, 200, 8)
    memory = {}
    for M in range(181, 201):
        mine, keys = q[:, :, M - 181, None], k[:, :, :M]
        kept, fresh = (method.select(mine, keys, Call.of(mine, keys, memory=m)) for m in (memory, {}))
        assert kept.parts[0] == fresh.parts[0] and torch.equal(kept.parts[1].index, fresh.parts[1].index)


def test_a_step_between_searches_uses_the_stages_as_they_were():
    method = InfiniteHiP(budget=70, refresh=(8, 4, 2), **SMALL)
    q, k, memory = torch.randn(1, 1, 16, 8).double(), torch.randn(1, 1, 216, 8).double(), {}
    kept = (70 - 6 - 10 - 7) // 4
    stages = []
    for M in range(201, 217):
        at, mine = M - 1, q[:, :, M - 201, None]
        got = method.select(mine, k[:, :, :M], Call.of(mine, k[:, :, :M], memory=memory)).parts[1].index[0, 0, 0]
        due = next((i for i, period in enumerate((8, 4, 2)) if at % period == 0), None)
        if due is not None:
            # stages before the one that is due stand
            stages = stages[:due]
            for i in range(due, 3):
                part = InfiniteHiP(70, **{**SMALL, "refresh": (8, 4, 2)})
                before = (
                    list(range(4, M - 10, 16))
                    if not stages
                    else [
                        a + j
                        for a in stages[-1]
                        for j in range(0, part.chunks[i - 1], part.chunks[i])
                        if a + j < M - 10
                    ]
                )
                keeps = kept if i == 2 else -(-max(part.keep[i], kept * 4) // part.chunks[i])
                size = part.chunks[i]
                if len(before) > keeps:
                    scores = {a: descend(mine[0, 0], k[0, 0], a, min(a + size, M - 10)) for a in before}
                    before = sorted(sorted(before, key=lambda a: -scores[a])[:keeps])
                stages.append(before)
        want = [a // 4 for a in stages[-1]]
        assert got[got >= 0].tolist() == want


@pytest.mark.parametrize("refresh", [(1, 1, 1), (24, 6, 3), (30, 30, 30)])
def test_no_token_is_in_neither_the_window_nor_the_search(refresh, monkeypatch):
    method = InfiniteHiP(budget=70, refresh=refresh, **SMALL)
    # stages that keep everything
    monkeypatch.setattr(InfiniteHiP, "_kept", lambda self, length: 100)
    k, memory = torch.randn(1, 1, 240, 8), {}
    for M in range(181, 241):
        q = torch.randn(1, 1, 1, 8)
        window, blocks = method.select(q, k[:, :, :M], Call.of(q, k[:, :, :M], memory=memory)).parts
        index = blocks.index[0, 0, 0]
        seen = torch.zeros(M, dtype=torch.bool)
        seen[: window.sink] = seen[M - window.recent :] = True
        for block in index[index >= 0].tolist():
            seen[block * 4 : block * 4 + 4] = True
        assert seen.all()


@pytest.mark.parametrize("drafted", [1, 2, 5, 15])
def test_tokens_that_were_taken_back_leave_no_trace(drafted):
    method = InfiniteHiP(budget=70, refresh=(12, 6, 4), **SMALL)
    sequence, draft = stream(210), stream(210, seed=1)
    feed, want = Feed(method), Feed(method)
    for each in (feed, want):
        each(sequence.part(0, 180))
        # searches at 180 and 184 were made, none is due at 185
        each(sequence.part(180, 185))
    feed(draft.part(185, 185 + drafted))
    feed.crop(drafted)
    torch.testing.assert_close(feed(sequence.part(185, 187)), want(sequence.part(185, 187)))


def test_counts_what_it_looks_at(monkeypatch):
    looked = []
    answer = kernel._answer

    def spy(rows, k, slots, *rest):
        looked.append(slots.numel() * rows.shape[3])
        return answer(rows, k, slots, *rest)

    monkeypatch.setattr(kernel, "_answer", spy)
    method = InfiniteHiP(budget=70, refresh=(1, 1, 1), **SMALL)
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 330, 8)
    method.select(q, k, Call.of(q, k))
    assert method.looks(Call.of(q, k), method._kept(330)) == sum(looked) > 0
    # a prompt's last query block, of 8 rows
    monkeypatch.setattr(infinitehip, "PACKED", 0)
    looked.clear()
    q = torch.randn(2, 4, 8, 8)
    method.select(q, k, Call.of(q, k))
    assert method.looks(Call.of(q, k), method._kept(330)) == sum(looked) > 0


@pytest.mark.parametrize("seed", range(2))
def test_finds_most_of_the_mass_where_neighbours_are_alike_and_little_where_they_are_not(seed):
    """8192 keys of width 64, 512 of them kept: against the best blocks, blocks by lot, and a window of as many keys."""
    method = InfiniteHiP(600, 0, 1, (256, 32, 8), (4096, 2048), (1, 1, 1), (1, 1, 1), block_q=1, first=0)
    q, k = smooth(seed)
    rng = torch.Generator().manual_seed(seed)

    def found(keys):
        at = torch.full((16, 1), 8192)
        return method._index(method.search(q[:, :, :, None], at, keys, at[:, 0] + 1, 8193, 64)[-1])[0, 0]

    chance = torch.stack([torch.randperm(1024, generator=rng)[:64] for _ in range(16)])
    window = torch.arange(1024 - 64, 1024).expand(16, -1)
    weights = torch.softmax(q[0, 0] @ k[0, 0].T / 8, -1)
    best = kept_mass(weights.view(16, 1024, 8).sum(-1).topk(64).indices, q, k, 8)
    ours = kept_mass(found(k), q, k, 8)
    assert ours > 0.7 * best and ours > 4 * kept_mass(chance, q, k, 8) and ours > 4 * kept_mass(window, q, k, 8)
    # the assumption: the same keys in no order
    mixed = k[:, :, torch.randperm(8192, generator=rng)]
    assert kept_mass(found(mixed), q, mixed, 8) < 0.5 * ours


def test_early_layers_and_small_contexts_are_dense():
    q, k = torch.randn(1, 2, 400, 8), torch.randn(1, 1, 400, 8)
    method = InfiniteHiP(256, 16, 64, (32, 8), (64,), (4, 1), (8, 4), first=2)
    assert method.select(q, k, Call.of(q, k, layer=1)) == Full()
    assert method.select(q, k, Call.of(q, k, layer=2)) != Full()
    q, k = q[:, :, :256], k[:, :, :256]
    assert method.select(q, k, Call.of(q, k, layer=2)) == Full() and method.estimate(Call.of(q, k, layer=2)) == 0


def test_a_plan_gives_layers_stages_of_their_own():
    args = {
        "budget": 600,
        "sink": 16,
        "window": 64,
        "chunks": [64, 8],
        "keep": [512],
        "strides": [4, 1],
        "refresh": [8, 2],
    }
    plan = Plan.uniform(ModelShape(2, 4, 2), prefill=InfiniteHiP(**args))
    rows = [plan.layers[0], tuple(type(a)(a.heads, a.method, {**a.args, "budget": 1200}) for a in plan.layers[1])]
    plan = Plan.from_json(Plan.per_head(plan.model, rows).to_json())
    assert [row[0].build().budget for row in plan.layers] == [600, 1200]
    assert plan.layers[0][0].build().chunks == (64, 8)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"budget": 0}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"budget": 1300}, "no chunk"),
        ({"refresh": [0, 0, 0]}, "refresh"),
        ({"refresh": [8, 16, 8]}, "period"),
        ({"refresh": 8}, "refresh"),
        ({"refresh": [8, 8]}, "refresh has 2"),
        ({"chunks": [256, 33, 8]}, "multiple"),
        ({"chunks": []}, "one stage|entries"),
        ({"keep": [32768]}, "keep has 1"),
        ({"keep": [100, 8192]}, "hold a chunk"),
        ({"strides": [5, 4, 1]}, "divide"),
        ({"window": 0}, "window"),
    ],
)
def test_bad_arguments(bad, word):
    with pytest.raises((InputError, PlanError), match=word):
        build("infinitehip", bad)
