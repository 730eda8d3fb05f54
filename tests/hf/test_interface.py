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


@pytest.mark.parametrize("name", ["GptOss", "MiMoV2Flash"])
@torch.no_grad()
def test_attention_sinks_are_refused_in_layers_that_keep_their_own_attention(name):
    """The second has them in its sliding layers alone, where no plan would meet them."""
    small = dict(sliding_window=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, v_head_dim=16)
    config = getattr(tf, f"{name}Config")(**TINY | small, pad_token_id=0)
    model = getattr(tf, f"{name}ForCausalLM")(config).eval()
    with attach(model, Plan.uniform(model)) as session:
        assert len(session.served()) < len(session.modules)
        for cache in (None, session.cache()):
            with pytest.raises(UnsupportedError, match=r"layer \d passes s_aux"):
                model(IDS, past_key_values=cache)


def test_a_model_that_looks_both_ways_is_refused_and_left_as_it_was():
    encoder = tf.BertLMHeadModel(tf.BertConfig(**TINY)).eval()
    with pytest.raises(UnsupportedError, match=r"BertLMHeadModel look at later ones \(is_causal=False\)"):
        attach(encoder, Plan.uniform(encoder))
    assert encoder.config._attn_implementation == "sdpa"
    decoder = tf.BertLMHeadModel(tf.BertConfig(**TINY, is_decoder=True)).eval()
    want = decoder(IDS).logits
    with attach(decoder, Plan.uniform(decoder)):
        torch.testing.assert_close(decoder(IDS).logits, want)


SHARED = dict(num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8)
PER_LAYER = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=64)
STATE_SPACE = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8)
BESIDE = {
    "Gemma4ForCausalLM": lambda few: tf.Gemma4TextConfig(**few | SHARED | PER_LAYER),
    "FalconH1ForCausalLM": lambda few: tf.FalconH1Config(**few | STATE_SPACE),
}


@pytest.mark.parametrize("name", BESIDE)
@torch.no_grad()
def test_layers_of_full_attention_that_are_not_served_are_what_they_were(name):
    """Their keys are another layer's, or they hold a state beside them."""
    few = TINY | dict(num_hidden_layers=4, num_key_value_heads=2, head_dim=16, pad_token_id=0)
    torch.manual_seed(0)
    model = getattr(tf, name)(BESIDE[name](few)).eval()
    ids, mask = torch.randint(3, 64, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0

    def run():
        cache = tf.DynamicCache(config=model.config)
        pieces = [model(part, past_key_values=cache).logits for part in ids.split((30, 1, 6, 3), 1)]
        return *pieces, model(ids, attention_mask=mask, use_cache=False).logits[:, 9:]

    want = run()
    with attach(model, Plan.uniform(model)) as session:
        assert len(session.served()) < len(session.modules)
        for got, piece in zip(run(), want, strict=True):
            torch.testing.assert_close(got, piece, atol=1e-5, rtol=1e-4)
        if getattr(model.config, "num_kv_shared_layers", 0):
            with pytest.raises(UnsupportedError, match="2 layers of this model read keys that other layers"):
                session.cache()
