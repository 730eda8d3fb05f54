"""Threads that share a model, each with a cache of its own: one reads in the middle of another's forward."""

import threading

import pytest
import torch
import transformers as tf
from every_method import make, plan_of, tokens

from saccade import attach


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", ["tidal", "quest", "hip"])
@torch.no_grad()
def test_a_forward_in_the_middle_of_another_thread_s_changes_nothing(name, own):
    model = make(tf.LlamaForCausalLM, tf.LlamaConfig)
    texts, found = [tokens(1, 90, seed=seed) for seed in (0, 1)], {}

    def read(at):
        cache = session.cache() if own else tf.DynamicCache(config=model.config)
        with torch.no_grad():
            model(texts[at][:, :80], past_key_values=cache)
            steps = [model(texts[at][:, i : i + 1], past_key_values=cache).logits for i in range(80, 90)]
        found[at] = torch.cat(steps, 1)

    def between(module, args):
        # once, in a step of the first thread: its keys are not yet made
        if threading.current_thread() is threading.main_thread() and args[0].shape[1] == 1 and 1 not in found:
            other = threading.Thread(target=read, args=(1,))
            other.start()
            other.join()

    with attach(model, plan_of(name, model)) as session:
        read(0), read(1)
        want = dict(found)
        found.clear()
        hook = model.model.layers[1].self_attn.k_proj.register_forward_pre_hook(between)
        read(0)
        hook.remove()
    assert set(found) == {0, 1}
    for at in found:
        torch.testing.assert_close(found[at], want[at])
