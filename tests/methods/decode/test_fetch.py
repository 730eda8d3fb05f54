"""What is true of FetchBlocks: the far blocks with the best bounds are read, and no others come near."""

import pytest
import torch

from saccade.cache.far import far_of
from saccade.cache.store import Store, call_for
from saccade.core.errors import InputError
from saccade.methods.apply import apply
from saccade.methods.decode import fetch as fetch_module
from saccade.methods.decode.fetch import FetchBlocks
from saccade.methods.policy.offload import Offload
from saccade.testing.inputs import Feed, stream

BLOCK, SINK = 5, 3


def feed_of(method, cache=20_000, layers=1):
    feed = Feed(method, layers=layers)
    policy = Offload(sink=SINK, recent=12, block=BLOCK, cache=cache)
    feed.stores = [Store([((0, 1), policy)], 2) for _ in range(layers)]
    return feed


def by_hand(q, k, v, held, far, blocks):
    """One query of two heads [2,D] over k, v [M,D]: far blocks by Quest's bound, the best share of any head."""
    shares = []
    for query in q.tolist():
        bounds = []
        for b in range(far):
            rows = k[SINK + b * BLOCK : SINK + (b + 1) * BLOCK].tolist()
            bound = 0.0
            for d, x in enumerate(query):
                bound += max(x * min(r[d] for r in rows), x * max(r[d] for r in rows))
            bounds.append(bound / len(query) ** 0.5)
        shares.append(torch.tensor(bounds, dtype=torch.float64).softmax(0))
    best = torch.stack(shares).amax(0).topk(blocks).indices.tolist()
    read = [j for j in range(len(k)) if not SINK <= j < SINK + far * BLOCK or (j - SINK) // BLOCK in best]
    scores = q @ k[read].T / q.shape[1] ** 0.5
    return scores.softmax(-1) @ v[read], len(read)


@pytest.mark.parametrize("blocks", [1, 3, 8])
@pytest.mark.parametrize("cache", [BLOCK * 32 * 8 + 8, BLOCK * 32 * 8 * 7, 1 << 20])
def test_matches_quest_by_hand(blocks, cache):
    sequence, feed = stream(200, layers=1, B=1), feed_of(FetchBlocks(blocks), cache)
    feed(sequence.part(0, 190))
    for a, b in [(190, 191), (191, 194), (194, 200)]:
        got = feed(sequence.part(a, b))[0, 0]
        store = feed.stores[0]
        far = next(held for name, held in store.memory[0].items() if name.startswith("far")).tier.blocks
        assert far > 25
        for g in range(2):
            for i in range(b - a):
                end = a + i + 1
                q = sequence.q[0, 0, 2 * g : 2 * g + 2, end - 1]
                want, _ = by_hand(q, sequence.k[0, 0, g, :end], sequence.v[0, 0, g, :end], 0, far, blocks)
                torch.testing.assert_close(got[2 * g : 2 * g + 2, i], want, atol=1e-9, rtol=1e-9)


def test_only_what_is_chosen_comes_near_and_stays():
    sequence, feed = stream(400, layers=1), feed_of(FetchBlocks(4), 1 << 20)
    feed(sequence.part(0, 390))
    feed(sequence.part(390, 391))
    far = next(held for name, held in feed.stores[0].memory[0].items() if name.startswith("far"))
    counters = far.tier.counters
    assert counters.misses == 4 * 2 and counters.moved == 8 * BLOCK * 32 * 8
    again = sequence.part(390, 391)
    for _ in range(3):
        feed.crop(1)
        feed(again)
    assert counters.misses == 8 and counters.hits > 8  # the same query finds its blocks there
    # of each head: the store, what was fetched, and two products for each far block
    held = feed.stores[0].views()[0].k.shape[2]
    assert feed.looks[-1].seen.estimate == 4 * (held + 4 * BLOCK + 2 * far.tier.blocks)
    assert feed.looks[-1].seen.scored == 4 * 2 * far.tier.blocks


def test_all_blocks_are_dense_and_a_later_prompt_is_too():
    sequence = stream(200)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.squeeze(1) for t in sequence[:3]), is_causal=True, enable_gqa=True
    )
    feed = feed_of(FetchBlocks(100), layers=4)
    got = torch.cat([feed(sequence.part(a, b)) for a, b in [(0, 100), (100, 101), (101, 150), (150, 160)]], 3)
    torch.testing.assert_close(got[0], want[:, :, :160], atol=1e-9, rtol=1e-9)


def test_some_heads_fetch_and_the_others_are_dense():
    sequence, policy = stream(150, layers=1), Offload(sink=SINK, recent=12, block=BLOCK, cache=20_000)
    store = Store([((0, 1), policy)], 2)
    q, k, v = (t[0] for t in sequence[:3])
    store.append(k, v)
    store.asked([q], now=True)
    view = store.views()[0]
    call = call_for(q[:, :, -1:], view, 150, (0, 1, 2, 3), memory=store.memory_of(slice(0, 1)))
    o = apply(q[:, :, -1:], view.k, view.v, call, [((2, 3), FetchBlocks(2))], policy)
    dense = torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True)
    torch.testing.assert_close(o[:, :2], dense[:, :2])
    far = far_of(call).tier.blocks
    want, read = by_hand(q[0, 2:, -1], k[0, 1], v[0, 1], 0, far, 2)
    assert read < 60
    torch.testing.assert_close(o[0, 2:, 0], want)


@pytest.mark.parametrize("blocks", [0, -1, 2.5, True])
def test_bad_arguments(blocks):
    with pytest.raises(InputError, match="blocks must be an int >= 1"):
        FetchBlocks(blocks)


@pytest.mark.parametrize("sign", ["old blocks are best", "all bounds are negative"])
def test_bounds_grow_by_parts_and_rows_may_be_picked(monkeypatch, sign):
    """Where the room of a part is used up another one begins; the choice is the same as from one."""
    monkeypatch.setattr(fetch_module, "ROOM", 2)
    monkeypatch.setattr(fetch_module, "STEP", 3)
    sequence, feed = stream(290, layers=1, B=2), feed_of(FetchBlocks(3))
    if sign == "old blocks are best":
        # queries and keys drift alike: turned round, a query looks for what came first
        sequence = sequence._replace(q=-sequence.q)
    else:
        # room that is not filled must not look like a block with a bound of 0
        sequence = sequence._replace(q=-sequence.q.abs() - 0.1, k=sequence.k.abs() + 0.1)
    feed(sequence.part(0, 150))
    for a, b in [*((i, i + 1) for i in range(150, 201)), (201, 231), *((i, i + 1) for i in range(231, 290))]:
        got = feed(sequence.part(a, b))
        if a == 200:
            # both rows go on as the second
            feed.select([1, 1])
            sequence = sequence.row([1, 1])
    memory = feed.stores[0].memory[0]
    bounds = next(held for name, held in memory.items() if name.startswith("fetch"))
    far = far_of_memory(memory).tier.blocks
    assert len(bounds.parts) > 4 and bounds.count == far == sum(bounds.counts)
    assert any(count < part.shape[2] for count, part in zip(bounds.counts[:-1], bounds.parts[:-1], strict=True))
    assert bounds.bytes() == sum(part.shape[2] for part in bounds.parts) * 2 * 2 * 32 * 8
    for b in range(2):
        for g in range(2):
            q = sequence.q[0, b, 2 * g : 2 * g + 2, 289]
            want, _ = by_hand(q, sequence.k[0, b, g], sequence.v[0, b, g], 0, far, 3)
            torch.testing.assert_close(got[b, 0, 2 * g : 2 * g + 2, 0], want, atol=1e-9, rtol=1e-9)


def far_of_memory(memory):
    return next(held for name, held in memory.items() if name.startswith("far"))
