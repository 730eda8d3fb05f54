"""Methods beside transformers' own caches: what is remembered follows the rows, with padding and repeats too."""

import pytest
import torch
import transformers as tf
from every_method import make, tokens

from saccade import Plan, attach


@pytest.fixture(scope="module")
def llama():
    return make(tf.LlamaForCausalLM, tf.LlamaConfig)


SMALL = {
    "quest": {"budget": 24, "block_k": 4, "first": 0},
    "recycled": {"budget": 24, "stride": 50},
}


def feed(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, attention_mask=mask).logits[:, -1:]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("index", [[2, 0, 1], [1, 1, 0], [0, 1, 2], [2], [0, 0, 1, 1, 2, 2]])
def test_rows_that_move_take_along_what_is_remembered(llama, name, padded, index):
    ids, mask = tokens(3, 90, seed=6), torch.ones(3, 90, dtype=torch.long)
    if padded:
        mask[1, :20] = 0
    at, one = torch.tensor(index), torch.ones(3, 1, dtype=torch.long)
    with attach(llama, Plan.uniform(llama, decode=(name, SMALL[name]))) as session:
        found = []
        for cache in (session.cache(), tf.DynamicCache(config=llama.config)):
            feed(llama, cache, ids, mask)
            token = torch.tensor([[5], [6], [7]])
            feed(llama, cache, token, torch.cat((mask, one), 1))
            cache.batch_select_indices(at)
            more = torch.cat((mask, one, one), 1)[at]
            found.append(feed(llama, cache, torch.arange(10, 10 + len(index))[:, None], more))
    torch.testing.assert_close(*found, atol=1e-7, rtol=1e-5)


def test_rows_of_another_text_begin_anew(llama):
    ids, plan = tokens(2, 90, seed=7), Plan.uniform(llama, decode=("recycled", SMALL["recycled"]))
    with attach(llama, plan):
        cache, fresh = (tf.DynamicCache(config=llama.config) for _ in range(2))
        for text, mine in ((ids, cache), (tokens(2, 91, seed=8), fresh)):
            feed(llama, mine, text)
            feed(llama, mine, torch.tensor([[5], [6]]))
        # another text's keys under a cache that goes on
        held = [(layer.keys, layer.values) for layer in fresh.layers]
        for layer, other in zip(cache.layers, held, strict=True):
            layer.keys, layer.values = other
        got = feed(llama, cache, torch.tensor([[8], [9]]))
        bare = tf.DynamicCache(config=llama.config)
        for layer, other in zip(bare.layers, held, strict=True):
            layer.lazy_initialization(*other)
            layer.keys, layer.values = other
        want = feed(llama, bare, torch.tensor([[8], [9]]))
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-5)
