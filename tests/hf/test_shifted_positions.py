"""Position ids that start elsewhere than at 0: with rotary positions attention sees distances, so nothing may change.

The model is exact: transformers rounds angles and norms to float32, which at position 1000 is more than what is asked
for here, so both are computed in float64. No token comes twice in a text: keys of one token are equal in the first
layer, and of equal scores `hipextend` takes the one that rounding makes the larger (the choice then differs by which
of two equal keys is read, and where it is moved to).

Some methods do look at more than distances, because the paper's rule looks at the channels of rotated vectors one by
one (`AXES`) or meets them with fixed random vectors (`hyper`): another start turns all queries and keys alike, and so
turns what these compare with.
"""

import math
import types
from itertools import pairwise

import pytest
import torch
import transformers as tf
from every_method import ALL, each_of, make, plan_of

import saccade.methods.select.hyper as hyper
from saccade import Plan, attach
from saccade.core.errors import InputError
from saccade.core.rope import Places, Rope
from saccade.methods.base import CachePolicy

LENGTH, CUTS, SHIFT = 150, (140, *range(141, 150)), 1000
# what is not a function of distances, and why: channels are looked at one by one
AXES = {
    "quest": "a page's bounds are a box along the channels",
    "quest-together": "a page's bounds are a box along the channels",
    "actqkv": "a z-score for each channel",
    "actqkv-together": "a z-score for each channel",
    "hard-signs": "a sign for each channel",
}
HASHED = [name for name in ALL if name.startswith("hyper")]


def exact(**more):
    """A tiny Llama in which nothing is rounded to float32."""

    def turn(self, x, position_ids):
        angle = (position_ids[..., None].double() * self.inv_freq.double()).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    def norm(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    model = make(tf.LlamaForCausalLM, tf.LlamaConfig, vocab_size=256, **more)
    model.model.rotary_emb.forward = types.MethodType(turn, model.model.rotary_emb)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = types.MethodType(norm, module)
    return model


@pytest.fixture(scope="module")
def llama():
    return exact()


def texts(rows, length=LENGTH):
    rng = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(253, generator=rng)[:length] + 3 for _ in range(rows)])


def feed(model, cache, ids, start):
    """Logits of a prompt and some decoding; `start` is the position of each row's first token."""
    at = torch.as_tensor(start).view(-1, 1) + torch.arange(ids.shape[1])
    with torch.no_grad():
        pieces = pairwise((0, *CUTS, ids.shape[1]))
        parts = [model(ids[:, a:b], position_ids=at[:, a:b], past_key_values=cache).logits for a, b in pieces]
    return torch.cat(parts, 1)


def apart(a, b):
    return float((a - b).abs().max())


@each_of([name for name in ALL if name not in AXES and name not in HASHED])
def test_a_text_may_start_anywhere(llama, name):
    ids = texts(2)
    with attach(llama, plan_of(name, llama)) as session:
        want = feed(llama, session.cache(LENGTH), ids, 0)
        # each row at a place of its own
        assert apart(feed(llama, session.cache(LENGTH), ids, (SHIFT, 7)), want) < 1e-9
        if not isinstance(ALL[name], CachePolicy):
            theirs = feed(llama, tf.DynamicCache(config=llama.config), ids, SHIFT)
            assert apart(theirs, want) < 1e-9


@each_of(AXES)
def test_what_looks_at_channels_changes_with_the_axes_only(name):
    """A start that turns each pair of channels by quarters of a circle swaps them and their signs: nothing changes."""
    model, ids = exact(), texts(1)
    quarters = torch.tensor([501.0, 262, 135, 67, 34, 17, 6, 1], dtype=torch.float64)
    model.model.rotary_emb.inv_freq = quarters * math.pi / 2 / SHIFT
    with attach(model, plan_of(name, model)) as session:
        want = feed(model, session.cache(), ids, 0)
        assert apart(feed(model, session.cache(), ids, SHIFT), want) < 1e-9
        # no reason is given for what needs none
        assert apart(feed(model, session.cache(), ids, 777), want) > 1e-2, AXES[name]


@each_of(HASHED)
def test_hashes_change_with_the_random_vectors_only(llama, name, monkeypatch):
    """Turned as the queries and keys are, they part them as before."""
    ids, rope, drawn = texts(1), Rope(llama.model.rotary_emb.inv_freq), hyper.normal
    with attach(llama, plan_of(name, llama)) as session:
        want = feed(llama, session.cache(), ids, 0)
        assert apart(feed(llama, session.cache(), ids, SHIFT), want) > 1e-2

        def turned(start, shape):
            columns = drawn(start, shape).T[None, None]
            return rope(columns, torch.full((shape[1],), SHIFT))[0, 0].T

        monkeypatch.setattr(hyper, "normal", turned)
        assert apart(feed(llama, session.cache(), ids, SHIFT), want) < 1e-9


@pytest.mark.parametrize("cache", ["ours", "theirs"])
@pytest.mark.parametrize("name", ["seer", "longheads", "hipextend"])
def test_padding_that_is_counted_is_a_start(llama, name, cache):
    """Called without position ids, a model counts a row's padding, too; `generate` does not."""
    ids, mask = texts(2), torch.ones(2, LENGTH, dtype=torch.long)
    ids[0, :37], mask[0, :37] = 0, 0

    def logits(ids, mask):
        made = session.cache() if cache == "ours" else tf.DynamicCache(config=llama.config)
        with torch.no_grad():
            first = llama(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=made).logits
            return torch.cat((first, llama(ids[:, -1:], attention_mask=mask, past_key_values=made).logits), 1)

    with attach(llama, plan_of(name, llama)) as session:
        got, alone = logits(ids, mask), logits(ids[:1, 37:], mask[:1, 37:])
    assert apart(got[0, 37:], alone[0]) < 1e-9


@pytest.mark.parametrize("name", ["seer", "longheads"])
def test_positions_with_gaps_are_refused_by_who_turns_keys_back(llama, name):
    ids, at = texts(1), torch.arange(LENGTH)[None] * 2
    words = "one more than that of the token before it; the 150 position_ids"
    with attach(llama, plan_of(name, llama)) as session, torch.no_grad(), pytest.raises(InputError, match=words):
        llama(ids, position_ids=at, past_key_values=session.cache())
    with attach(llama, Plan.uniform(llama, prefill="streaming")) as session, torch.no_grad():
        # nobody asks
        assert llama(ids, position_ids=at, past_key_values=session.cache()).logits.isfinite().all()


@pytest.mark.parametrize("ours", [True, False])
def test_keys_turn_back_from_wherever_they_stand(llama, ours):
    """They are the keys of a model whose positions are all 0, in the first layer; padding has no say in it."""
    ids, mask, starts = texts(2, 60), torch.ones(2, 60, dtype=torch.long), torch.tensor([[SHIFT], [7]])
    mask[0, :11] = 0
    found = []
    with attach(llama, Plan.uniform(llama, prefill="streaming")) as session, torch.no_grad():
        session.watch = lambda seen: found.append(seen) if seen.call.layer == 0 else None
        llama(ids, position_ids=torch.zeros_like(ids))
        free = found.pop().k
        for parts in ((slice(0, 60),), (slice(0, 40), slice(40, 58), slice(58, 60))):
            cache = session.cache() if ours else tf.DynamicCache(config=llama.config)
            for part in parts:
                at, real = starts + torch.arange(60)[None, part], mask[:, : part.stop]
                llama(ids[:, part], attention_mask=real, position_ids=at, past_key_values=cache)
            for row, (pad, seen) in enumerate(zip((11, 0), found[-2:], strict=True)):
                assert seen.k.shape[2] == 60 - pad
                got = seen.call.rope.free(seen.k, torch.arange(60 - pad))
                torch.testing.assert_close(got, free[row : row + 1, :, pad:], atol=1e-12, rtol=1e-12)


def test_free_turns_back_from_where_each_row_stands():
    rope = Rope(torch.rand(3, dtype=torch.float64))
    t, slots = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.arange(4, 9)
    at = torch.stack((slots + 90, slots - 4))
    moved = rope(t, at[:, None])
    there = Rope(rope.frequencies, places=Places(at[:, 2:], 6))
    torch.testing.assert_close(there.free(moved, slots), t)
    torch.testing.assert_close(rope.free(rope(t, slots), slots), t)
