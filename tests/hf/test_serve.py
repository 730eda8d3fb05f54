"""Calls that come otherwise than usual: caches with room behind the tokens, pieces of nothing but padding."""

import pytest
import torch
import transformers as tf
from transformers import DynamicCache, StaticCache

from saccade import Plan, attach

TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TINY, vocab_size=97)).eval()


@torch.no_grad()
def feed(model, ids, cache, cuts, mask=None):
    outs, begin = [], 0
    for end in (*cuts, ids.shape[1]):
        more = {} if mask is None else {"attention_mask": mask[:, :end]}
        outs.append(model(ids[:, begin:end], past_key_values=cache, **more).logits)
        begin = end
    return torch.cat(outs, 1)


@pytest.mark.parametrize("padded", [False, True])
def test_a_static_cache_is_as_long_as_what_it_holds(model, padded):
    ids, mask = torch.randint(97, (2, 50)), torch.ones(2, 50, dtype=torch.long)
    if padded:
        mask[1, :7] = 0
    # worked out by hand: 4 + 0.2 * 50
    plans = [
        Plan.uniform(model, prefill=("streaming", {"sink": 2, "recent": n})) for n in ({"base": 4, "slope": 0.2}, 14)
    ]
    with attach(model, plans[1]), torch.no_grad():
        want = model(ids, attention_mask=mask, use_cache=False).logits
    with attach(model, plans[0]) as session:
        cache = StaticCache(config=model.config, max_cache_len=80)
        got = feed(model, ids, cache, (), mask)
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()])
        assert {way for way, _ in session.ways} == {"other cache"}


@pytest.mark.parametrize("case", ["our cache", "our cache, evicting", "dynamic cache"])
def test_a_piece_that_is_padding_in_all_rows(model, case):
    ids, mask = torch.randint(97, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    mask[:, 20:30], mask[0, 33] = 0, 0
    policy = {"cache": ("duo", {"sink": 2, "recent": 9})} if "evicting" in case else {}
    with attach(model, Plan.uniform(model, **policy)) as session, torch.no_grad():
        cache = DynamicCache(config=model.config) if "dynamic" in case else session.cache()
        got = feed(model, ids, cache, (20, 30), mask)
        assert got.isfinite().all()
        for row in range(2):
            # the row alone, without what is padding, at the positions that the batch gave its tokens
            alone, want = session.cache(), []
            for piece in (slice(0, 20), slice(20, 40)):
                at = torch.arange(40)[piece][mask[row, piece].bool()]
                out = model(ids[row, at][None], position_ids=at[None], past_key_values=alone)
                want.append(out.logits[0])
            torch.testing.assert_close(got[row, mask[row].bool()], torch.cat(want), atol=1e-5, rtol=1e-4)
