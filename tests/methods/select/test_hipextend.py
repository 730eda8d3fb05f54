"""HiPExtend against loops written from the paper, its distances, and a text eight times as long as in training."""

import pytest
import torch

from saccade import Plan, attach
from saccade.core.call import Call
from saccade.core.errors import InputError, PlanError, UnsupportedError
from saccade.core.rope import Rope
from saccade.core.table import build
from saccade.kernels.attend import attend
from saccade.kernels.moved import attend_moved
from saccade.methods.select import hipextend
from saccade.methods.select.hipextend import HiPExtend
from saccade.recipe.toy import LENGTH, exact, pages, passkey_model
from saccade.testing import Feed, run, stream

D = 8
ROPE = Rope(torch.rand(4, dtype=torch.float64))
SMALL = dict(trained=60, keys=56, sink=6, window=10, chunks=(16, 4), keep=(48,), strides=(4, 2), block_q=8)


def make(N, M=None, H=2, G=1):
    M = N if M is None else M
    q, k, v = (torch.randn(1, h, n, D).double() for h, n in ((H, N), (G, M), (G, M)))
    return q, k, v, ROPE(q, torch.arange(M - N, M)), ROPE(k, torch.arange(M))


def turn(t, to):
    """A vector without a position, at a position."""
    return ROPE(t.view(1, 1, 1, D), torch.tensor([to])).flatten()


def blocks_of(method, q, k, positions, kept, indexed):
    """Blocks found for queries [R,D] at positions, from keys [M,D]; none of them rotated."""
    last_size = method.chunks[-1]
    stop = int(positions[-1]) + 1 - method.window
    starts = list(range(method.sink // last_size * last_size, stop, method.chunks[0]))
    for i, size in enumerate(method.chunks):
        if i:
            starts = [a + j for a in starts for j in range(0, method.chunks[i - 1], size) if a + j < stop]
        keeps = kept if i == len(method.keep) else -(-max(method.keep[i], kept * last_size) // size)
        to = [min(int(p), len(starts) + method.window) if indexed else method.window + 1 for p in positions]
        rows = torch.stack([turn(x, p) for x, p in zip(q, to, strict=True)])
        judges = rows if len(rows) == 1 else rows.unflatten(0, (-1, method.strides[i])).mean(1)
        if len(starts) <= keeps:
            continue

        def score(number, low, high, judges=judges):
            best = -float("inf")
            while high - low > 1 or best == -float("inf"):
                middle = (low + high) // 2
                found = []
                for right, (a, b) in enumerate([(low, middle), (middle, high)]):
                    key = turn(k[(a + b) // 2], number if indexed else right)
                    found.append(float((judges @ key).max()) if b > a else -float("inf"))
                best = max(best, *found)
                low, high = (middle, high) if found[1] > found[0] else (low, middle)
            return best

        scores = {a: score(number, a, min(a + size, stop)) for number, a in enumerate(starts)}
        starts = sorted(sorted(starts, key=lambda a: -scores[a])[:keeps])
    return {a // last_size for a in starts}


@pytest.mark.parametrize("layer", [0, 1])
def test_against_queries_one_by_one(layer):
    method = HiPExtend(**SMALL, refresh=(1, 1), indexed=1)
    N, size = 131, 4
    q, k, v, q_at, k_at = make(N)
    got = method.attend(q_at, k_at, v, Call.of(q_at, k_at, rope=ROPE, layer=layer)).o
    near = Call.of(q_at[:, :, :60], k_at[:, :, :60], layer=layer)
    want = torch.zeros(1, 2, N, D).double()
    want[:, :, :60] = method._inner.attend(q_at[:, :, :60], k_at[:, :, :60], v[:, :, :60], near).o
    kept = 56 // size - 2 - (-(-(10 + 8 - 1) // size) + 1)
    for h in range(2):
        for first in range(60, N, 8):
            rows = [min(t, N - 1) for t in range(first, first + 8)]
            found = blocks_of(method, q[0, h, rows], k[0, 0], torch.tensor(rows), kept, layer == 0)
            assert len(found) <= kept
            listed = sorted(found | {0, 1} | set(range((first - 9) // size, rows[-1] // size + 1)))
            assert len(listed) * size <= 56
            for t in range(first, min(first + 8, N)):
                slots = [b * size + i for b in listed for i in range(size) if b * size + i <= t]
                place = {s: j for j, s in enumerate(b * size + i for b in listed for i in range(size))}
                keys = torch.stack([turn(k[0, 0, s], place[s]) for s in slots])
                weights = torch.softmax(keys @ turn(q[0, h, t], place[t]) / D**0.5, -1)
                want[0, h, t] = weights @ v[0, 0, slots]
    torch.testing.assert_close(got, want)


def test_as_infinitehip_on_positions_that_the_model_knows():
    _, _, v, q_at, k_at = make(58)
    call = Call.of(q_at, k_at, rope=ROPE)
    method = HiPExtend(**{**SMALL, "keys": 40}, refresh=(2, 1))
    torch.testing.assert_close(
        method.attend(q_at, k_at, v, call).o, method._inner.attend(q_at, k_at, v, Call.of(q_at, k_at)).o
    )
    # and dense while everything may be read
    short = Call.of(q_at[:, :, :40], k_at[:, :, :40], rope=ROPE)
    dense = attend(q_at[:, :, :40], k_at[:, :, :40], v[:, :, :40], None, short).o
    torch.testing.assert_close(method.attend(q_at[:, :, :40], k_at[:, :, :40], v[:, :, :40], short).o, dense)


@pytest.mark.parametrize("pieces", [[300], [150, 150], [150, *[1] * 30, 5, 16, 40, *[1] * 40, 19]])
def test_no_distance_is_longer_than_what_is_read(pieces, monkeypatch):
    listed = []

    def spy(q, k, v, blocks, call):
        listed.append((blocks, call))
        return attend_moved(q, k, v, blocks, call)

    monkeypatch.setattr(hipextend, "attend_moved", spy)
    method = HiPExtend(**SMALL, refresh=(6, 2))
    run(method, stream(300, layers=2), pieces)
    assert listed
    for blocks, call in listed:
        index = blocks.index
        assert int((index >= 0).sum(-1).max()) * blocks.block_k <= method.keys <= method.trained
        for i in range(index.shape[2]):
            for h in range(index.shape[1]):
                real = [b for b in index[0, h, i].tolist() if b >= 0]
                first = call.offset + i * blocks.block_q
                last = min(first + blocks.block_q, call.shape.M) - 1
                # while decoding, the first stage may have ended where the window began at the last multiple of 6
                begin = first // 6 * 6 if blocks.block_q == 1 else first
                near = set(range((begin - method.window + 1) // 4, last // 4 + 1))
                assert real == sorted(set(real)) and {0, 1} | near <= set(real)
                assert index[0, h, i].tolist()[: len(real)] == real and real[-1] == last // 4


def test_decoding_with_periods_of_one_is_a_prompt_of_single_rows():
    # what is read at once is as long as what the model knows: before that all is dense
    over = {"keys": 60, "block_q": 1, "strides": (1, 1)}
    method, sequence = HiPExtend(**{**SMALL, **over}, refresh=(1, 1)), stream(110, layers=2)
    torch.testing.assert_close(run(method, sequence, [50, *[1] * 60]), run(method, sequence, [110]))
    torch.testing.assert_close(run(method, sequence, [50, 16, 9, 1, 16, 16, 2]), run(method, sequence, [110]))


def test_tokens_that_were_taken_back_leave_no_trace():
    method, sequence, other = HiPExtend(**SMALL, refresh=(12, 4)), stream(150), stream(150, seed=5)
    feed, want = Feed(method), Feed(method)
    for each in (feed, want):
        each(sequence.part(0, 97))
        each(sequence.part(97, 102))
    feed(other.part(102, 115))
    feed.crop(13)
    torch.testing.assert_close(feed(sequence.part(102, 108)), want(sequence.part(102, 108)))


@pytest.mark.slow
def test_a_model_trained_at_256_tokens_finds_a_passkey_in_2048():
    """The toy, 32 pages, the fact told 16 times: dense attention is lost at 2048 tokens, moved positions are not."""
    model = passkey_model()
    args = dict(trained=LENGTH, keys=224, sink=8, window=32, chunks=[32, 8], keep=[256], strides=[2, 1], refresh=[4, 2])
    plan = Plan.uniform(
        model, **{p: ("hipextend", {**args, "block_q": 32, "indexed": 1}) for p in ("prefill", "decode")}
    )
    rng = torch.Generator().manual_seed(1)
    assert exact(model, pages(LENGTH, 32, rng, told=16)) == 1.0
    page = pages(8 * LENGTH, 32, rng, told=16)
    assert exact(model, page) < 0.5
    with attach(model, plan) as session:
        # in one prompt, and with the question as a decoding step
        assert exact(model, page[:16], session.cache()) > 0.9
        assert exact(model, page[16:], session.cache(), chunk=4096) > 0.9


def test_what_it_cannot_do():
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 90, 8)
    with pytest.raises(UnsupportedError, match="rotates"):
        HiPExtend(**SMALL, refresh=(1, 1)).attend(q, k, k, Call.of(q, k))
    holes = dict(q_pos=torch.arange(81, 90)[None], k_pos=torch.arange(90)[None, None])
    with pytest.raises(UnsupportedError, match="holes"):
        HiPExtend(**SMALL, refresh=(1, 1)).attend(q, k, k, Call.of(q, k, rope=ROPE, **holes))


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"keys": 0}, "keys"),
        ({"keys": 9000}, "beyond"),
        ({"keys": 1352}, "no chunk"),
        ({"trained": 0}, "trained"),
        ({"refresh": [0, 0, 0]}, "refresh"),
        ({"indexed": -1}, "indexed"),
    ],
)
def test_bad_arguments(bad, word):
    with pytest.raises((InputError, PlanError), match=word):
        build("hipextend", bad)
