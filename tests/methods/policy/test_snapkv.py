"""SnapKV against its definition, and its claim: what the prompt's end asks about survives, what it does not is lost."""

import pytest
import torch
from every_method import make
from transformers import GraniteConfig, GraniteForCausalLM

from saccade import Plan, attach
from saccade.cache.store import DRAFT
from saccade.core.errors import InputError
from saccade.methods.policy.h2o import H2O
from saccade.methods.policy.snapkv import SnapKV
from saccade.testing import Feed, run, stream


def held(method, sequence, pieces):
    feed, a = Feed(method, layers=1), 0
    for n in pieces:
        if n < 0:
            feed.crop(-n)
            continue
        feed(sequence.part(a, a + n))
        a += n
    feed.stores[0].settle()
    view = feed.stores[0].views()[0]
    return [list(range(view.k.shape[2]))] * 2 if view.pos is None else view.pos[0].tolist()


def naive(sequence, pieces, method):
    """What each key head holds: the votes of the last queries, pooled by hand. A piece below 0 takes tokens back."""
    share, out = sequence.q.shape[2] // sequence.k.shape[2], []
    for g in range(sequence.k.shape[2]):
        mine, end, q, k = [], 0, sequence.q[0, 0], sequence.k[0, 0]
        for n in pieces:
            if n < 0:
                q, k = (torch.cat((t[:, : end + n], t[:, end:]), 1) for t in (q, k))
                mine, end = [p for p in mine if p < end + n], end + n
                continue
            mine, end = mine + list(range(end, end + n)), end + n
            if len(mine) <= method.capacity + method.slack:
                continue
            votes = dict.fromkeys(mine, 0.0)
            for h in range(g * share, (g + 1) * share):
                for i in range(end - method.window, end):
                    seen = [p for p in mine if p <= i]
                    w = torch.softmax(torch.stack([q[h, i] @ k[g, p] for p in seen]) / q.shape[-1] ** 0.5, 0)
                    for p, weight in zip(seen, w.tolist(), strict=True):
                        votes[p] += weight / share
            newest = method.window + DRAFT
            old, reach = mine[:-newest], method.kernel // 2
            pooled = [max(votes[p] for p in old[max(0, s - reach) : s + reach + 1]) for s in range(len(old))]
            best = sorted(range(len(old)), key=lambda s: -pooled[s])[: method.capacity - newest]
            mine = sorted(old[s] for s in best) + mine[-newest:]
        out.append(mine)
    return out


@pytest.mark.parametrize(
    "pieces", [[90], [70, 1, 1, 1, 9, 1], [40, 30, 17, 2], [36, -2, 3], [60, -9, 1, 9, 6], [32, 3, -4, 6]]
)
def test_against_the_definition(pieces):
    method = SnapKV(capacity=32, window=8, kernel=3, slack=4)
    sequence = stream(sum(n for n in pieces if n > 0), layers=1, D=6)
    got, want = held(method, sequence, pieces), naive(sequence, pieces, method)
    for a, b in zip(got, want, strict=True):
        # equal pooled votes of neighbours may fall either way at the edge
        assert len(a) == len(b) and len(set(a) ^ set(b)) <= 2
    assert got[0] != got[1]


def asks(about):
    """Only the last query looks for token `about`."""
    sequence = stream(600, layers=1, seed=1)
    # a direction of its own, so that no other query cares
    sequence.k[..., about, :] = 0
    sequence.k[..., about, 0] = 60
    sequence.q[..., :-1, 0] = -1
    sequence.q[..., -1:, 0] = 2
    return sequence


def test_what_the_end_asks_about_stays_and_heavy_hitters_alone_lose_it():
    sequence = asks(about=123)
    assert all(123 in row for row in held(SnapKV(64, window=8), sequence, [600]))
    # summed over all queries the one that cares hardly counts
    assert not any(123 in row for row in held(H2O(heavy=24, recent=24), sequence, [600]))


def test_what_it_does_not_ask_about_is_lost_for_the_next_question():
    sequence = asks(about=123)
    sequence.q[..., -1:, 0] = -1
    assert not any(123 in row for row in held(SnapKV(64, window=8), sequence, [600]))


@pytest.mark.parametrize("pieces", [[36, -2, 3], [32, 3, -4, 6]])
def test_tokens_that_were_taken_back_have_no_vote(pieces):
    sequence, end = asks(about=5), sum(pieces[: pieces.index(min(pieces))])
    sequence.q[..., -1:, 0] = -1
    sequence.q[..., end + min(pieces) : end, 0] = 2
    assert not any(5 in row for row in held(SnapKV(32, window=8, kernel=1, slack=4), sequence, pieces))


@pytest.mark.parametrize("method", [SnapKV(40, window=8, slack=4), H2O(heavy=12, recent=12)])
def test_votes_are_weights_by_the_model_s_own_scale(method):
    """A scale of 1 on the logits is queries four times as long under a scale of 1/4."""
    ids = torch.randint(3, 61, (1, 120), generator=torch.Generator().manual_seed(0))
    kept = []
    for scale, stretch in ((1.0, 1.0), (0.25, 4.0)):
        model = make(GraniteForCausalLM, GraniteConfig, attention_multiplier=scale)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data *= stretch
        with attach(model, Plan.uniform(model, cache=method)) as session, torch.no_grad():
            cache = session.cache()
            for part in ids.split((90, 1, 1, 1, 9, 9, 9), 1):
                model(part, past_key_values=cache)
            # a copy keeps what it has by the same scale
            layers = cache.fork().layers
            kept.append([layer.store.settle() or layer.store.views()[0].pos for layer in layers])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_a_short_prompt_is_dense():
    sequence = stream(90)
    got = run(SnapKV(capacity=100, window=4), sequence, [80, 1, 9])
    q, k, v = (t.squeeze(1) for t in sequence[:3])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got[0], want)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"capacity": 0}, "capacity"),
        ({"kernel": 4}, "odd"),
        ({"capacity": 40, "window": 32}, "above"),
        ({"slack": -1}, "slack"),
    ],
)
def test_bad_sizes(bad, word):
    with pytest.raises(InputError, match=word):
        SnapKV(**bad)
