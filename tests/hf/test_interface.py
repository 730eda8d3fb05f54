"""Who answers for a model's attention, and how long: until the session ends, or until nobody has the model."""

import gc
import weakref

import pytest
import torch
import transformers as tf

from saccade import Plan, attach
from saccade.core.errors import UnsupportedError
from saccade.hf.interface import NAME, attention, attention_modules, server_of

TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
IDS = torch.arange(8)[None]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TINY)).eval()


def streaming(model):
    return Plan.uniform(model, prefill=("streaming", {"sink": 0, "recent": 1}))


def test_a_session_answers_for_every_attention_module_until_it_ends(model):
    modules = attention_modules(model)
    assert list(modules) == [0, 1] and [server_of(m) for m in modules.values()] == [None, None]
    with attach(model, Plan.uniform(model)) as session:
        assert all(server_of(m) is session for m in modules.values()) and model.config._attn_implementation == NAME
    assert [server_of(m) for m in modules.values()] == [None, None] and model.config._attn_implementation == "sdpa"
    with pytest.raises(UnsupportedError, match="without a plan"):
        attention(modules[0], *torch.zeros(3, 1, 2, 4, 16), None)


@torch.no_grad()
def test_a_session_works_where_nobody_holds_it(model):
    with attach(model, streaming(model)):
        want = model(IDS).logits
    dense = model(IDS).logits
    attach(model, streaming(model))
    gc.collect()
    assert torch.equal(model(IDS).logits, want) and not torch.allclose(want, dense, atol=1e-3)


@torch.no_grad()
def test_a_model_that_is_dropped_while_attached_is_gone():
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TINY)).eval()
    session = attach(model, Plan.uniform(model))
    model(IDS, past_key_values=session.cache())
    gone = weakref.ref(model)
    del model, session
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_a_session_that_ended_takes_nothing_from_the_next(model):
    with attach(model, Plan.uniform(model)) as first:
        first.detach()
        session = attach(model, streaming(model))
        want = model(IDS, past_key_values=session.cache()).logits
    # the end of the block has detached the first once more
    assert torch.equal(model(IDS, past_key_values=session.cache()).logits, want)
    assert session.calls == {0: 2, 1: 2}
    session.detach()
