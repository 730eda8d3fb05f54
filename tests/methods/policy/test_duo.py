"""DuoAttention's policy: what streaming heads keep and see (gates and published files: tests/fit)."""

import pytest
import torch

from saccade.cache.store import DRAFT, Store
from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Full, Window
from saccade.methods.policy.duo import DuoAttention
from saccade.testing import Feed, run, stream


def keep(policy, M, **fields):
    q, k = torch.zeros(1, 4, 1, 2), torch.zeros(1, 2, M, 2)
    return policy.keep(q, k, k, Call.of(q, k, **fields))


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_by_hand():
    policy = DuoAttention(sink=2, recent=3)
    assert keep(policy, 30).flatten().tolist() == [0, 1, *range(30 - 3 - DRAFT, 30)]
    assert policy.pattern(None) == Window(2, 3)


@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (4, 12), (64, 256), (3, 1)])
@pytest.mark.parametrize("M", [1, 16, 17, 18, 80, 400])
def test_length_and_content(sink, recent, M):
    policy = DuoAttention(sink, recent)
    most = sink + recent + DRAFT
    slots = keep(policy, M)
    assert policy.claim(M) == min(M, most)
    if most >= M:
        assert slots is None
    else:
        assert slots.shape == (1, 1, most)
        assert slots.flatten().tolist() == [*range(sink), *range(M - recent - DRAFT, M)]


def test_the_window_counts_as_in_the_paper():
    # a query sees min(i + 1, sink + recent) keys once the window is past the sinks
    sequence = stream(40, layers=1)
    call = Call.of(sequence.q[0], sequence.k[0])
    counts = DuoAttention(4, 9).pattern(call).mask(call)[0, 0].sum(-1).tolist()
    assert counts == [min(i + 1, 13) for i in range(40)]


def test_all_heads_retrieval_is_dense():
    sequence = stream(120)
    nobody = Feed(DuoAttention(2, 3), heads=())
    nobody.stores = [Store([], 2) for _ in nobody.stores]
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(t.squeeze(1) for t in sequence[:3]), is_causal=True, enable_gqa=True
    )
    same(nobody(sequence)[0], dense)


@pytest.mark.parametrize("pieces", [[120], [60, 60], [100, 1, 1, 18]])
def test_all_streaming_with_room_for_everything_is_dense(pieces):
    sequence = stream(120)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(t.squeeze(1) for t in sequence[:3]), is_causal=True, enable_gqa=True
    )
    for policy in (DuoAttention(0, 120), DuoAttention(120, 1), DuoAttention(60, 60)):
        same(run(policy, sequence, pieces)[0], dense)


@pytest.mark.parametrize("pieces", [[120], [119, 1], [40, 80], [17] * 7 + [1], [90, *[1] * 30], [100, 5, 15]])
def test_streaming_heads_match_the_paper_s_mask(pieces):
    """Key j is seen by query i when j <= i and (j < sink or i - j < recent), however the sequence is cut."""
    sequence, i, j = stream(120), torch.arange(120)[:, None], torch.arange(120)
    mask = (j <= i) & ((j < 4) | (i - j < 9))
    q, k, v = (t.squeeze(1) for t in sequence[:3])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    same(run(DuoAttention(4, 9), sequence, pieces)[0], want)


def test_retrieval_heads_beside_streaming_heads_are_dense():
    sequence, feed = stream(200), Feed(DuoAttention(4, 9), heads=(0,))
    feed(sequence)
    retrieval, streaming = feed.stores[0].views()
    assert (retrieval.heads, streaming.heads) == ((1,), (0,))
    assert (retrieval.k.shape[2], streaming.k.shape[2]) == (200, 4 + 9 + DRAFT)
    assert [look.pattern for look in feed.looks[:2]] == [Full(), Window(4, 9)]


def test_kept_keys_are_those_of_the_ends():
    sequence, feed = stream(200, layers=1), Feed(DuoAttention(4, 9), layers=1)
    feed(sequence)
    feed.stores[0].settle()
    view = feed.stores[0].views()[0]
    kept = [0, 1, 2, 3, *range(200 - 9 - DRAFT, 200)]
    assert view.pos[0].tolist() == [kept, kept]
    assert torch.equal(view.k[0], sequence.k[0, 0][:, kept])
    assert torch.equal(view.v[0], sequence.v[0, 0][:, kept])


def test_half_of_the_heads_hold_half_of_the_bytes():
    sequence = stream(4000, layers=1, dtype=torch.float32)
    held = {}
    for heads in ((), (1,)):
        feed = Feed(DuoAttention(16, 64), heads=heads, layers=1)
        feed.stores = [Store([(heads, feed.method)] if heads else [], 2)]
        feed(sequence)
        held[heads] = feed.stores[0].bytes()
    assert held[(1,)] <= 0.55 * held[()]


def test_defaults_are_the_paper_s():
    assert (DuoAttention().sink, DuoAttention().recent) == (64, 256)


@pytest.mark.parametrize("args", [{"sink": -1}, {"recent": 0}, {"sink": 1.5}, {"recent": True}, {"recent": "all"}])
def test_bad_arguments(args):
    with pytest.raises(InputError, match=next(iter(args))):
        DuoAttention(**args)
