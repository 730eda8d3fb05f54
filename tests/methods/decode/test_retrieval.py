"""What is true of RetrievalAttention: it reads its window and what the index finds, wherever the keys lie."""

import threading

import pytest
import torch

from saccade import Plan, attach
from saccade.cache.far import far_of
from saccade.cache.store import Store, call_for
from saccade.cache.tier import Tier
from saccade.core.call import Call
from saccade.core.errors import DamagedError, InputError, PlanError, UnsupportedError
from saccade.core.pattern import Full
from saccade.core.table import build
from saccade.kernels.search import background
from saccade.methods.apply import apply, overheard
from saccade.methods.decode.retrieval import RetrievalAttention
from saccade.methods.policy.offload import Offload
from saccade.testing.inputs import Feed, Stream, run, stream

FLAT = RetrievalAttention(budget=40, sink=3, near=12, kind="flat")
GRAPH = RetrievalAttention(budget=40, sink=3, near=12, queue=400, learn=50, wait=True)


def paper(q, k, v, window, count):
    """One query q [D] over keys k [M,D]: softmax over the window and the `count` best keys outside of it."""
    scores = [sum(a * b for a, b in zip(q.tolist(), row, strict=True)) / len(q) ** 0.5 for row in k.tolist()]
    others = sorted((j for j in range(len(scores)) if j not in window), key=lambda j: -scores[j])
    read = sorted({*window, *others[:count]})
    # over the window and over what was found apart, then together
    parts = [[j for j in read if j in window], [j for j in read if j not in window]]
    outs, sums = [], []
    for part in parts:
        if part:
            s = torch.tensor([scores[j] for j in part], dtype=torch.float64)
            outs.append(torch.softmax(s, 0) @ v[part])
            sums.append(s.logsumexp(0))
    weights = torch.softmax(torch.stack(sums), 0)
    return sum(w * o for w, o in zip(weights, outs, strict=True))


@pytest.mark.parametrize("method", [FLAT, GRAPH])
@pytest.mark.parametrize("M", [1, 15, 40, 41, 60, 130])
def test_matches_paper_loop(method, M):
    sequence = stream(M, layers=1, B=2)
    q, k, v = (t[0] for t in sequence[:3])
    memory = {}
    if M > 1:
        past = [t[:, :, :-1] for t in (q, k)]
        method.prompt(*past, Call.of(*past, memory=memory))
    n = min(M, 3)
    call = Call.of(q[:, :, M - n :], k, memory=memory)
    if M == 1:
        assert isinstance(method.select(q, k, call), Full)
    o = method.attend(q[:, :, M - n :], k, v, call).o
    for b in range(2):
        for h in range(4):
            for i in range(n):
                end = M - n + i + 1
                window = {j for j in range(end) if j < 3 or j > end - 13}
                count = 25 if M > 40 else M
                want = paper(q[b, h, end - 1], k[b, h // 2, :end], v[b, h // 2, :end], window, count)
                torch.testing.assert_close(o[b, h, i], want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", [FLAT, GRAPH])
@pytest.mark.parametrize("heads", [None, (0, 1), (1, 2, 3), (3,)])
def test_beside_offload_it_reads_the_store_and_the_best_far_keys(method, heads):
    policy, length = Offload(sink=3, recent=12, block=5, cache=4000), 170
    sequence = stream(length, layers=1)
    q, k, v = (t[0] for t in sequence[:3])
    store = Store([((0, 1), policy)], 2)
    store.append(k[:, :, :-2], v[:, :, :-2])
    view = store.views()[0]
    call = call_for(q[:, :, :-2], view, length - 2, (0, 1, 2, 3), memory=store.memory_of(slice(0, 1)))
    overheard(q[:, :, :-2], view.k, call, [(heads, method)])
    store.asked([q[:, :, :-2]], now=True)
    store.append(k[:, :, -2:], v[:, :, -2:])
    view = store.views()[0]
    call = call_for(q[:, :, -2:], view, length, (0, 1, 2, 3), memory=store.memory_of(slice(0, 1)))
    far = far_of(call)
    assert far.tier.tokens > 100 and view.k.shape[2] < 50
    o = apply(q[:, :, -2:], view.k, view.v, call, [(heads, method)], policy)
    for h in range(4):
        for i in range(2):
            end = length - 1 + i
            window = {j for j in range(end) if not 3 <= j < 3 + far.tier.tokens}
            count = 25 if heads is None or h in heads else length  # the others are dense
            want = paper(q[0, h, end - 1], k[0, h // 2, :end], v[0, h // 2, :end], window, count)
            torch.testing.assert_close(o[0, h, i], want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", [FLAT, GRAPH])
def test_steps_and_drafts_give_the_same(method):
    sequence = stream(170, layers=2)
    single = run(method, sequence, [150, *[1] * 20])
    for pieces in ([150, 16, 4], [150, 2, 1, 16, 1]):
        torch.testing.assert_close(run(method, sequence, pieces), single, atol=1e-9, rtol=1e-9)


def held_back(monkeypatch):
    """Indices that are built only when the event is set."""
    event, build_now = threading.Event(), background._build

    def build_later(*args):
        assert event.wait(20)
        return build_now(*args)

    monkeypatch.setattr(background, "_build", build_later)
    return event


@pytest.mark.parametrize("offloaded", [False, True])
def test_building_does_not_block_decoding(monkeypatch, offloaded):
    event = held_back(monkeypatch)
    method = RetrievalAttention(budget=40, sink=3, near=12, queue=30, learn=50)
    exact = RetrievalAttention(budget=40, sink=3, near=12, kind="flat")
    sequence = stream(400, layers=1)

    def feed_of(method):
        feed = Feed(method, layers=1)
        if offloaded:
            feed.stores = [Store([((0, 1), Offload(sink=3, recent=12, block=5, cache=4000))], 2)]
        return feed

    # what lies far is all read meanwhile: it costs less than to search it all
    feed, flat = feed_of(method), feed_of(RetrievalAttention(budget=4096, sink=3, near=12) if offloaded else exact)
    costs = []
    for a, b in [(0, 390), (390, 391), (391, 392), (392, 393)]:
        got, want = feed(sequence.part(a, b)), flat(sequence.part(a, b))
        # the index is not there: nothing is missed, and nothing waits for it
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
        costs.append(feed.looks[-1].seen.estimate)
    held = next(held for name, held in feed.stores[0].memory[0].items() if name.startswith("retrieval"))
    assert held["index"] is None and not held["next"].ready()
    event.set()
    held["next"].wait()
    feed(sequence.part(393, 394))
    assert held["index"] is not None and held["next"] is None
    # from now on fewer keys are scanned
    seen = feed.looks[-1].seen
    assert seen.estimate < 0.8 * costs[-1]
    if offloaded:
        # the store and 25 far keys of each head are read; the rest was scored to find them
        assert seen.estimate - seen.scored == 4 * (seen.call.shape.M + 25) and seen.scored > 0


def test_a_build_that_fails_is_told(monkeypatch):
    def broken(*args):
        raise InputError("graph: keys hold NaN or infinity")

    monkeypatch.setattr(background, "_build", broken)
    feed = Feed(GRAPH, layers=1)
    feed(stream(100, layers=1).part(0, 90))
    with pytest.raises(InputError, match="NaN"):
        feed(stream(100, layers=1).part(90, 91))


def test_an_index_over_tokens_that_were_taken_back_is_not_used():
    sequence, other = stream(200, layers=1), stream(200, layers=1, seed=5)
    feed = Feed(GRAPH, layers=1)
    for a, b in [(0, 190), (190, 191)]:
        feed(sequence.part(a, b))
    feed.crop(91)  # below what the index covers
    feed(other.part(100, 199))
    got = feed(other.part(199, 200))
    joined = Stream(*(torch.cat((a[..., :100, :], b[..., 100:, :]), -2) for a, b in zip(sequence, other, strict=True)))
    want = run(FLAT, joined, [199, 1])
    torch.testing.assert_close(got, want[..., 199:, :], atol=1e-9, rtol=1e-9)


def test_it_is_built_anew_when_many_tokens_are_beyond_it():
    method = RetrievalAttention(budget=40, sink=3, near=12, queue=400, learn=50, wait=True, refresh=20)
    sequence, feed = stream(200, layers=1), Feed(method, layers=1)
    feed(sequence.part(0, 100))
    covers = []
    for at in range(100, 200):
        feed(sequence.part(at, at + 1))
        held = next(held for name, held in feed.stores[0].memory[0].items() if name.startswith("retrieval"))
        covers.append(held["index"].covers)
    assert covers[0] == 85 and sorted(set(covers)) == [85, 105, 125, 145, 165]
    want = run(FLAT, sequence, [100, *[1] * 100])
    torch.testing.assert_close(torch.cat([look.o for look in feed.looks[1:]], 2), want[:, 0, :, 100:])


def test_queries_of_the_prompt_are_learned_from():
    sequence = stream(300, layers=1)
    feed = Feed(GRAPH, layers=1)
    feed(sequence.part(0, 200))
    memory = feed.stores[0].memory[0]
    held = next(held for name, held in memory.items() if name.startswith("retrieval"))
    assert held["queries"].shape == (1, 4, 50, 16)
    for row in held["queries"][0, 1]:
        assert (row == sequence.q[0, 0, 1, :200]).all(-1).any()
    feed(sequence.part(200, 300))
    assert held["queries"].shape == (1, 4, 50, 16)
    assert torch.equal(held["queries"][0, :, -1], sequence.q[0, 0, :, 299])


@pytest.mark.parametrize("method", [FLAT, GRAPH])
def test_rows_may_be_picked_while_their_keys_are_far(method):
    sequence, rows = stream(200, layers=1, B=2), [1, 0, 1]

    def fed(pieces, picked=None, only=None):
        feed = Feed(method, layers=1)
        feed.stores = [Store([((0, 1), Offload(sink=3, recent=12, block=5, cache=40_000))], 2)]
        mine = sequence if only is None else sequence.row([only])
        for a, b in pieces:
            out = feed(mine.part(a, b))
        if picked is not None:
            feed.select(picked)
            out = feed(sequence.row(picked).part(192, 194))
        return out

    got = fed([(0, 190), (190, 192)], rows)
    for at, row in enumerate(rows):
        want = fed([(0, 190), (190, 192), (192, 194)], only=row)
        torch.testing.assert_close(got[at : at + 1], want, atol=1e-9, rtol=1e-9)


def test_large_logits_do_not_overflow():
    sequence = stream(200, layers=1)
    scaled = sequence._replace(q=sequence.q * 400)
    feed = Feed(FLAT, layers=1)
    feed.stores = [Store([((0, 1), Offload(sink=3, recent=12, block=5, cache=4000))], 2)]
    feed(scaled.part(0, 190))
    got = feed(scaled.part(190, 200))[:, 0]
    q, k, v = (t[0] for t in scaled[:3])
    # the softmax is all on one key, which the search finds
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, want[:, :, 190:])


@pytest.mark.slow
def test_generates_with_the_reader():
    from saccade.reader import load

    model, tokenizer = load()
    text = "The code of the amber lantern is 4021932. " + "It rained on the moor. " * 90
    ids = tokenizer(text + "\n\nWhat is the code of the amber lantern? It is", return_tensors="pt")
    small = {"budget": 150, "sink": 16, "near": 64, "wait": True}
    for plan in (
        Plan.uniform(model, decode=("retrieval", small)),
        Plan.uniform(model, decode=("retrieval", small), cache=("offload", {"sink": 16, "recent": 64, "block": 16})),
    ):
        with attach(model, plan) as session, torch.no_grad():
            out = model.generate(**ids, max_new_tokens=8, past_key_values=session.cache(), do_sample=False)
        assert tokenizer.decode(out[0, -8:]).strip() == "4021932"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"budget": 0}, "budget must be an int >= 1, got 0"),
        ({"budget": 640}, "leaves nothing to retrieve"),
        ({"near": 0}, "near"),
        ({"kind": "grahp"}, "did you mean 'graph'"),
        ({"queue": 0}, "queue"),
        ({"kind": "lists", "probes": 0}, "probes"),
        ({"kind": "flat", "probes": 8}, "has no clusters to probe"),
        ({"refresh": 0}, "refresh"),
    ],
)
def test_bad_arguments(args, said):
    with pytest.raises(InputError, match=said):
        RetrievalAttention(**args)
    with pytest.raises(PlanError, match=said):
        build("retrieval", args)


def test_all_clusters_probed_is_exact_and_few_scan_less():
    # the list of wanted keys, always scanned, takes 1024 of them
    q, k = (t[0] for t in stream(4000, layers=1)[:2])

    def read(kind, probes):
        method = RetrievalAttention(budget=40, sink=3, near=12, kind=kind, probes=probes, wait=True)
        memory = {}
        past = [t[:, :, :-1] for t in (q, k)]
        method.prompt(*past, Call.of(*past, memory=memory))
        call = Call.of(q[:, :, -1:], k, memory=memory)
        chosen = method.select(q[:, :, -1:], k, call).parts[1].index.sort(-1).values
        return chosen, method.estimate(call)

    exact, whole = read("flat", None)
    same, all_of_them = read("lists", 4000)
    fewer, some = read("lists", 2)
    torch.testing.assert_close(same, exact)
    assert some < 0.5 * all_of_them and some < 0.5 * whole and not torch.equal(fewer, exact)


def test_a_budget_above_the_length_is_dense():
    q = torch.randn(1, 2, 1, 8)
    k = torch.randn(1, 1, 700, 8)
    assert RetrievalAttention(budget=10**9).select(q, k, Call.of(q, k)) == Full()


def test_a_store_with_holes_is_refused():
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 50, 8)
    call = Call.of(q, k, q_pos=torch.tensor([[80]]), k_pos=torch.arange(50)[None, None])
    with pytest.raises(UnsupportedError, match="holes"):
        FLAT.select(q, k, call)


def test_keys_that_lie_far_are_read_by_the_thread(monkeypatch):
    """A million keys take seconds to read: the first step does not wait for that either."""
    event, reading, read = threading.Event(), threading.Event(), Tier.keys

    def slow(self, first=0, last=None, heads=None):
        if threading.current_thread().name.startswith("saccade-index"):
            reading.set()
            assert event.wait(20)
        return read(self, first, last, heads)

    monkeypatch.setattr(Tier, "keys", slow)
    method = RetrievalAttention(budget=40, sink=3, near=12, kind="lists")
    sequence, feed = stream(400, layers=1), Feed(method, layers=1)
    flat = Feed(RetrievalAttention(budget=4096, sink=3, near=12), layers=1)
    for each in (feed, flat):
        each.stores = [Store([((0, 1), Offload(sink=3, recent=12, block=5, cache=4000))], 2)]
    for a, b in [(0, 390), (390, 391), (391, 392)]:
        torch.testing.assert_close(feed(sequence.part(a, b)), flat(sequence.part(a, b)), atol=1e-9, rtol=1e-9)
    assert reading.wait(20)
    held = next(held for name, held in feed.stores[0].memory[0].items() if name.startswith("retrieval"))
    assert held["index"] is None
    event.set()
    coming = held["next"]
    coming.wait()
    feed(sequence.part(392, 393))
    assert held["index"] is coming and coming.covers >= 350


def far_of_memory(memory):
    return next(held for name, held in memory.items() if name.startswith("far"))


def test_damage_that_the_thread_meets_is_told():
    sequence = stream(300, layers=1)
    method = RetrievalAttention(budget=40, sink=3, near=12, kind="lists", wait=True)
    feed = Feed(method, layers=1)
    feed.stores = [Store([((0, 1), Offload(sink=3, recent=12, block=5, cache=4000))], 2)]
    feed(sequence.part(0, 290))
    tier = far_of_memory(feed.stores[0].memory[0]).tier
    tier.arena.slabs[0][int(tier.table[0, 1, 7])] += 1
    with pytest.raises(DamagedError, match="another layer's"):
        feed(sequence.part(290, 291))
