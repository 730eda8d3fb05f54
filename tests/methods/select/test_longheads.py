"""LongHeads against loops written from the paper, its distances, and a context far beyond the trained length."""

import math

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.rope import Rope
from saccade.kernels.attend import attend
from saccade.methods.select.longheads import LongHeads, chunk_keys
from saccade.testing import Feed, run, stream

D = 8
ROPE = Rope(torch.rand(4, dtype=torch.float64))


def make(N, M=None, H=2, G=1, seed=0):
    M = N if M is None else M
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, h, n, D).double() for h, n in ((H, N), (G, M), (G, M)))
    return q, k, v, ROPE(q, torch.arange(M - N, M)), ROPE(k, torch.arange(M))


def test_chunk_keys_by_hand():
    size, first = 5, 10
    q, k, v, q_at, k_at = make(15)
    moved = Rope(ROPE.frequencies)
    q_at, k_at = moved(q, torch.arange(first, first + 15)), moved(k, torch.arange(first, first + 15))
    call = Call.of(q_at, k_at, rope=ROPE)
    got = chunk_keys(q_at, k_at, v, first, size, ROPE, call)
    for h in range(2):
        for c in range(3):
            part = slice(c * size, (c + 1) * size)
            # the paper's code rotates inside the chunk
            mine, keys = ROPE(q[:, h : h + 1, part], torch.arange(5))[0, 0], ROPE(k[:, :, part], torch.arange(5))[0, 0]
            out = torch.softmax(mine @ keys.T / D**0.5, -1) @ v[0, 0, part]
            want = torch.softmax(out.mean(0) @ keys.T / D**0.5, -1) @ keys
            torch.testing.assert_close(got[0, h, c], want)


def test_a_chunk_of_one_token_is_its_key():
    _, k, v, q_at, k_at = make(6)
    got = chunk_keys(q_at, k_at, v, 0, 1, ROPE, Call.of(q_at, k_at))
    torch.testing.assert_close(got, k.expand(1, 2, 6, D))


def naive(q, k, v, q_at, k_at, method, rows):
    """Each query by itself: choose chunks, renumber, rotate free keys, softmax."""
    size, N, M = method.chunk, q.shape[2], k.shape[2]
    begin = method.keys if method.begin is None else method.begin
    summed = chunk_keys(
        q_at[:, :, : M // size * size],
        *(t[:, :, : M // size * size] for t in (k_at, v)),
        0,
        size,
        ROPE,
        Call.of(q_at, k_at),
    )
    out = torch.zeros(1, q.shape[1], N, D).double()
    for h in range(q.shape[1]):
        for t in range(N):
            if t < begin:
                scores = ROPE(q[:, h : h + 1, t : t + 1], torch.tensor([t]))[0, 0] @ k_at[0, 0, : t + 1].T / D**0.5
                out[0, h, t] = torch.softmax(scores, -1) @ v[0, 0, : t + 1]
                continue
            # the query blocks begin behind the dense rows
            f = begin + (t - begin) // rows * rows
            l = min(f + rows, N) - 1
            before = f // size
            forced = {0, *range(max(0, before - 1), l // size + 1)}
            best = dict.fromkeys(range(1, before - 1), 0.0)
            for r in range(f, l + 1):
                weight = {c: math.exp(float(q[0, h, r] @ summed[0, h, c]) / D**0.5) for c in best}
                best = {c: max(w, weight[c] / sum(weight.values())) for c, w in best.items()}
            room = method.keys // size + (-(-(rows - 1) // size) if rows > 1 else 0) - len(forced)
            chosen = sorted([*forced, *sorted(best, key=lambda c: -best[c])[: max(0, room)]])
            slots = [s for c in chosen for s in range(c * size, min((c + 1) * size, M))]
            full = [c * size + i for c in chosen for i in range(size)]
            new = {s: i for i, s in enumerate(full)}
            slots = [s for s in slots if s <= t]
            mine = ROPE(q[:, h : h + 1, t : t + 1], torch.tensor([new[t]]))[0, 0, 0]
            keys = torch.stack([ROPE(k[:, :, s : s + 1], torch.tensor([new[s]]))[0, 0, 0] for s in slots])
            assert max(new[t] - new[s] for s in slots) < method.keys + rows + size
            out[0, h, t] = torch.softmax(keys @ mine / D**0.5, -1) @ v[0, 0, slots]
    return out


@pytest.mark.parametrize(("rows", "tile"), [(1, 1 << 24), (4, 1 << 24), (7, 1 << 24), (7, 200)])
def test_against_queries_one_by_one(rows, tile, monkeypatch):
    monkeypatch.setattr("saccade.methods.select.longheads.TILE", tile)
    method = LongHeads(keys=16, chunk=4, begin=12, block_q=rows)
    q, k, v, q_at, k_at = make(50)
    got = method.attend(q_at, k_at, v, Call.of(q_at, k_at, rope=ROPE)).o
    torch.testing.assert_close(got, naive(q, k, v, q_at, k_at, method, rows))


def test_decoding_is_the_same_as_rows_that_choose_alone():
    method, sequence = LongHeads(keys=32, chunk=8, begin=8, block_q=1), stream(120)
    # while decoding each token chooses for itself: prefill in blocks of one says the same
    torch.testing.assert_close(run(method, sequence, [20, *[1] * 100]), run(method, sequence, [120]))
    torch.testing.assert_close(
        run(method, sequence, [20, 7, 9, 1, 16, 16, 16, 16, 16, 3]), run(method, sequence, [120])
    )


def test_dense_up_to_the_trained_length():
    _, _, v, q_at, k_at = make(60)
    call = Call.of(q_at, k_at, rope=ROPE)
    torch.testing.assert_close(
        LongHeads(keys=64, chunk=16).attend(q_at, k_at, v, call).o, attend(q_at, k_at, v, None, call).o
    )


def test_finds_what_dense_attention_cannot_at_a_distance_it_was_not_made_for():
    """Within 256 tokens the channels hardly turn; at 3000 they have turned around and what matches looks opposite."""
    N, trained = 4096, 256
    frequency = torch.tensor([0.00105, 0.0011, 0.001, 0.0009], dtype=torch.float64)
    rope = Rope(frequency)
    torch.manual_seed(0)
    k, q = 0.3 * torch.randn(1, 1, N, D).double(), 0.3 * torch.randn(1, 1, N, D).double()
    v = torch.zeros(1, 1, N, D).double()
    needle = torch.randn(D).double()
    needle *= 9 / needle.norm()
    at = 1111
    k[0, 0, at] = v[0, 0, at] = needle
    q[0, 0, at // 64 * 64 : at // 64 * 64 + 64] = needle
    q[0, 0, -1] = needle
    q_at, k_at = rope(q, torch.arange(N)), rope(k, torch.arange(N))
    last = Call.of(q_at[:, :, -1:], k_at, rope=rope)
    dense = attend(q_at[:, :, -1:], k_at, v, None, last).o[0, 0, -1] @ needle / 81
    method = LongHeads(keys=trained, chunk=64)
    call = Call.of(q_at, k_at, rope=rope)
    ours = method.attend(q_at, k_at, v, call).o[0, 0, -1] @ needle / 81
    assert dense < 0.1 < 0.9 < ours


def test_it_must_have_seen_the_queries_of_the_prompt():
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 90, 8)
    call = Call.of(q, k, rope=Rope(torch.rand(4)), layer=3)
    with pytest.raises(InputError, match=r"prefill and decode.*same heads"):
        LongHeads(keys=32, chunk=8).attend(q, k, k, call)
    with pytest.raises(UnsupportedError, match="rotates"):
        LongHeads(keys=32, chunk=8).attend(k, k, k, Call.of(k, k))


@pytest.mark.parametrize("count", [1, 8, 13])
def test_a_draft_that_is_taken_back_leaves_the_queries_of_its_chunk(count):
    """A chunk that the draft had begun or finished is summed up from the tokens that stayed."""
    sequence = stream(130)
    method = LongHeads(keys=40, chunk=8, begin=24, block_q=12)
    feed = Feed(method)
    feed(sequence.part(0, 100))
    feed(sequence.changed(100, "q", "k", "v").part(100, 100 + count))
    feed.crop(count)
    got = torch.cat([feed(sequence.part(at, at + 1)) for at in range(100, 130)], -2)
    alone = Feed(method)
    alone(sequence.part(0, 100))
    torch.testing.assert_close(got, torch.cat([alone(sequence.part(at, at + 1)) for at in range(100, 130)], -2))


def test_another_question_after_tokens_were_taken_back():
    method, sequence, other = LongHeads(keys=32, chunk=8, begin=0), stream(150), stream(150, seed=5)
    feed = Feed(method)
    feed(sequence.part(0, 100))
    feed(other.part(100, 113))
    feed.crop(13)
    got = feed(sequence.part(100, 110))
    want = Feed(method)
    want(sequence.part(0, 100))
    torch.testing.assert_close(got, want(sequence.part(100, 110)))


def test_a_prompt_is_taken_back_in_whole_chunks():
    method, sequence = LongHeads(keys=32, chunk=8, begin=0), stream(150)
    feed = Feed(method)
    feed(sequence.part(0, 100))
    feed.crop(30)
    with pytest.raises(InputError, match=r"70 tokens.*whole chunks of 8"):
        feed(sequence.part(70, 71))
    feed, want = Feed(method), Feed(method)
    feed(sequence.part(0, 100))
    feed.crop(28)
    want(sequence.part(0, 72))
    torch.testing.assert_close(feed(sequence.part(72, 80)), want(sequence.part(72, 80)))


@pytest.mark.parametrize(
    "bad", [{"keys": 0}, {"keys": 100, "chunk": 64}, {"keys": 192, "chunk": 64}, {"begin": -1}, {"block_q": 0}]
)
def test_bad_sizes(bad):
    with pytest.raises(InputError, match="LongHeads"):
        LongHeads(**bad)
