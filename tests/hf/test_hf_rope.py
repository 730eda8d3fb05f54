"""rope_of on real models: keys that are turned back are the keys of a model whose positions are all zero."""

import pytest
import torch
import transformers as tf

from saccade import Plan, attach

TINY = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    max_position_embeddings=512,
    pad_token_id=0,
)
FULL = ["full_attention", "sliding_attention"]
MODELS = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, {}),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, dict(head_dim=16)),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, dict(head_dim=24, sliding_window=8, layer_types=FULL)),
    "phi, half the channels": (tf.PhiForCausalLM, tf.PhiConfig, dict(partial_rotary_factor=0.5)),
    "glm, neighbours": (tf.GlmForCausalLM, tf.GlmConfig, dict(head_dim=16)),
    "yarn": (
        tf.LlamaForCausalLM,
        tf.LlamaConfig,
        dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0)),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_keys_turn_back(name):
    cls, config, extra = MODELS[name]
    model = cls(config(**{**TINY, **extra})).eval()
    ids = torch.randint(3, 97, (1, 40))
    keys, ropes = [], []

    def watch(seen):
        if seen.call.layer == 0:
            keys.append(seen.k.clone())
            ropes.append(seen.call.rope)

    with torch.no_grad(), attach(model, Plan.uniform(model, prefill="streaming")) as session:
        session.watch = watch
        for positions in (torch.arange(40)[None], torch.zeros(1, 40, dtype=torch.long)):
            model(ids, position_ids=positions, past_key_values=session.cache())
    rope = ropes[0]
    assert not torch.allclose(keys[0], keys[1], atol=1e-2)
    torch.testing.assert_close(rope(keys[0], torch.arange(40), inverse=True), keys[1], atol=1e-5, rtol=1e-4)


LATENT = dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, kv_lora_rank=16, q_lora_rank=16)
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=32)
PLAIN = dict(layer_types=["full_attention"] * 2, sliding_window=8)
UNKNOWN = {
    "cohere2, no positions": (tf.Cohere2ForCausalLM, tf.Cohere2Config, PLAIN),
    "exaone4, no positions": (tf.Exaone4ForCausalLM, tf.Exaone4Config, PLAIN),
    "smollm3, no positions in its second": (tf.SmolLM3ForCausalLM, tf.SmolLM3Config, dict(no_rope_layers=[1, 0])),
    "deepseek, last channels": (
        tf.DeepseekV3ForCausalLM,
        tf.DeepseekV3Config,
        {"num_key_value_heads": 4, **LATENT, **EXPERTS},
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_layer_that_does_not_rotate_its_first_channels_is_not_known(name):
    cls, config, extra = UNKNOWN[name]
    model, ropes = cls(config(**{**TINY, **extra})).eval(), {}
    with torch.no_grad(), attach(model, Plan.uniform(model, prefill="streaming")) as session:
        session.watch = lambda seen: ropes.update({seen.call.layer: seen.call.rope})
        model(torch.randint(3, 97, (1, 20)), past_key_values=session.cache())
    assert ropes[1] is None
    assert (ropes[0] is not None) == name.startswith("smollm3")


@pytest.mark.parametrize("rules", [dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)])
def test_frequencies_that_change_with_the_length_are_not_known(rules):
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**TINY, "rope_parameters": rules})).eval()
    with attach(model, Plan.uniform(model, prefill="streaming")) as session, torch.no_grad():
        found = []
        session.watch = lambda seen: found.append(seen.call.rope)
        model(torch.arange(20)[None], past_key_values=session.cache())
    assert found == [None, None]
