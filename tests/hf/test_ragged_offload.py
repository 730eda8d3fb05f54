"""Rows of different lengths have a block cache each: too few bytes for all are refused before any of them is read."""

import re

import pytest
import torch
import transformers as tf
from every_method import make, tokens

from saccade import Plan, attach
from saccade.core.errors import InputError

LAYERS, BLOCK = 4, 8
PLACE = BLOCK * 2 * 16 * 8 + 8  # a block of one head's keys and values in float64, and its checksum


@pytest.fixture(scope="module")
def llama():
    return make(tf.LlamaForCausalLM, tf.LlamaConfig)


def ragged():
    """A long text and one that puts nothing away before it has grown."""
    ids, mask = tokens(2, 100), torch.ones(2, 100, dtype=torch.long)
    ids[0, :85], mask[0, :85] = 0, 0
    return ids, mask


def plan_with(model, cache):
    return Plan.uniform(model, cache=("offload", {"sink": 4, "recent": 9, "block": BLOCK, "cache": cache}))


def generate(model, ids, mask, beams=1, **cache):
    usual = dict(max_new_tokens=26, do_sample=False, num_beams=beams, pad_token_id=0)
    return model.generate(ids, attention_mask=mask, **usual, **cache)


@pytest.mark.parametrize("beams", [1, 3])
def test_what_the_refusal_asks_for_is_enough_and_less_is_not(llama, beams):
    ids, mask = ragged()
    want = generate(llama, ids, mask, beams)
    with attach(llama, plan_with(llama, LAYERS * PLACE)) as session:
        cache = session.cache()
        with pytest.raises(InputError, match=f"4 layers, each with {2 * beams} rows of different lengths") as refused:
            generate(llama, ids, mask, beams, past_key_values=cache)
        # nothing was read, so that it is good for what it has room for
        assert cache.get_seq_length() == 0
        alone = generate(llama, ids[1:], mask[1:], past_key_values=cache)
        assert torch.equal(alone, generate(llama, ids[1:], mask[1:], past_key_values=session.cache()))
    least = int(re.search(r"make cache (\d+) or more", str(refused.value))[1])
    assert least == 2 * beams * LAYERS * PLACE
    with attach(llama, plan_with(llama, least)) as session:
        assert torch.equal(generate(llama, ids, mask, beams, past_key_values=session.cache()), want)
    with attach(llama, plan_with(llama, least - 1)) as session, pytest.raises(InputError, match="rows of different"):
        generate(llama, ids, mask, beams, past_key_values=session.cache())


@pytest.mark.parametrize("first", [20, 80])
def test_rows_that_part_later(llama, first):
    """Before tokens were moved each will need its own cache; rows that moved theirs together go on with one."""
    ids, mask = tokens(2, 110, seed=1), torch.ones(2, 110, dtype=torch.long)
    ids[0, first : first + 5], mask[0, first : first + 5] = 0, 0

    def read(cache):
        at = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            more = dict(past_key_values=cache)
            llama(ids[:, :first], attention_mask=mask[:, :first], position_ids=at[:, :first], **more)
            return llama(ids[:, first:], attention_mask=mask, position_ids=at[:, first:], **more).logits[:, -1]

    want = read(tf.DynamicCache(config=llama.config))
    with attach(llama, plan_with(llama, LAYERS * PLACE)) as session:
        if first == 20:
            with pytest.raises(InputError, match="each with 2 rows"):
                read(session.cache())
        else:
            torch.testing.assert_close(read(session.cache()), want)
    with attach(llama, plan_with(llama, 2 * LAYERS * PLACE)) as session:
        torch.testing.assert_close(read(session.cache()), want)
