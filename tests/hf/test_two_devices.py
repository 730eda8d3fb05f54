"""Models whose layers lie on two devices, as `device_map` spreads them: what layers hand on is moved to who reads it.

The second device is pretended (tests/shared/elsewhere.py): an operator that is given tensors from both raises. On two
GPUs the same is asked at the end.
"""

import pytest
import torch
import transformers as tf
from elsewhere import HERE, THERE, TwoDevices, patched, spread
from every_method import ALL, make, plan_of, tokens

from saccade import attach
from saccade.methods.base import CachePolicy

# in the quick run: those that hand choices on from layer to layer, and one of each kind of memory
QUICK = {"dense", "tidal", "actqkv", "quest", "longheads", "seer", "fetch", "offload-no_sink", "duo"}
# these go through so many small operators, each of them looked at, that one kind of cache must do
LONG = {"retrieval", "infinitehip", "hip", "hipextend", "recycled", "recycled-trigger", "offload"}
LENGTH, CUTS = 110, (96, 97, 98, 101, 110)
every_method = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)


def logits(model, name, ours, device=HERE):
    """A padded batch: a prompt, single tokens, a draft; between them rows change places, where the cache is ours."""
    ids, real = tokens(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    ids[0, :31], real[0, :31] = 0, 0
    at, found, a = (real.cumsum(1) - 1).clamp_min(0), [], 0
    ids, real, at = (t.to(device) for t in (ids, real, at))
    with attach(model, plan_of(name, model)) as session, torch.no_grad():
        cache = session.cache(LENGTH) if ours else tf.DynamicCache(config=model.config)
        for b in CUTS:
            more = dict(attention_mask=real[:, :b], position_ids=at[:, a:b], past_key_values=cache)
            found.append(model(ids[:, a:b], **more).logits)
            if ours and b == 98:
                cache.reorder_cache(torch.tensor([1, 1, 2], device=device))
                at, real = at[[1, 1, 2]], real[[1, 1, 2]]
            a = b
    return torch.cat(found, 1)


@pytest.fixture(scope="module")
def models():
    """The same model on one device and on two, whose borders lie behind the first and the third layer."""
    one, two = (make(tf.LlamaForCausalLM, tf.LlamaConfig).requires_grad_(False) for _ in range(2))
    with TwoDevices():
        spread(two, layers=(1, 2))
    return one, two


@every_method
def test_layers_on_two_devices_are_the_model_on_one(models, name, monkeypatch):
    one, two = models
    for ours in (True,) if name in LONG or isinstance(ALL[name], CachePolicy) else (True, False):
        want = logits(one, name, ours)
        with monkeypatch.context() as patch, TwoDevices():
            patched(patch)
            got = logits(two, name, ours)
        assert got.device == HERE
        torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-5)


def test_the_second_device_refuses_what_a_gpu_would():
    with TwoDevices():
        x, y = torch.ones(3, device=THERE), torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices"):
            x + y
        assert (x + y.to(THERE)).device == (x * y.sum()).device == THERE
        assert torch.equal(x.cpu(), y) and x.tolist() == y.tolist()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs; the pretended device stands in for them")
@pytest.mark.parametrize("name", ["tidal", "actqkv", "longheads"])
def test_layers_on_two_gpus(name):
    model = make(tf.LlamaForCausalLM, tf.LlamaConfig).requires_grad_(False).to("cuda:0")
    # a CPU sums in another order: the same model on one GPU is what it must equal
    want = logits(model, name, True, torch.device("cuda", 0))
    accelerate = pytest.importorskip("accelerate")
    parts = {f"model.layers.{at}": int(at in (1, 2)) for at in range(4)}
    parts |= dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), 0)
    got = logits(accelerate.dispatch_model(model, parts), name, True, torch.device("cuda", 0))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
