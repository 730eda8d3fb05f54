"""A cache outlives the mode that it was filled in: whatever is done to it then, in any other, gives the same numbers.

Modes are `inference_mode`, which marks the tensors that are born in it, `no_grad`, which `generate` uses, and the plain
one, with weights that want gradients. The reference does everything under `no_grad`.
"""

import gc
import sys
import weakref
from itertools import permutations

import pytest
import torch
import transformers as tf
from every_method import ALL, SLOW, make, plan_of, tokens

from saccade import attach
from saccade.cache.far import Far
from saccade.cache.store import Store
from saccade.cache.tier import Tier
from saccade.core.errors import UnsupportedError
from saccade.kernels.scan import scan
from saccade.methods.base import Layer
from saccade.methods.policy.snapkv import SnapKV
from saccade.nn.attention import Attention
from saccade.testing import instances

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
PAIRS = list(permutations(MODES, 2))
# each goes from one mode to the other and back several times; the other pairs are slow together
QUICK = [("inference", "no_grad")]
FAR = ["fetch+offload-no_sink", "retrieval-flat+offload-no_sink", "offload-no_sink"]
# of methods that remember nothing from call to call, dense stands for all in the quick run
REMEMBER = ("dense", "hip", "tidal", "quest", "recycled", "longheads", "actqkv", "fetch", "retrieval", "offload")
REMEMBER += ("duo", "h2o", "snapkv", "razor", "moa")
NAMES = list(dict.fromkeys([*ALL, *FAR]))
STEPS = (
    "dense",
    "streaming",
    "tidal",
    "quest",
    "recycled",
    "hip",
    "hard",
)  # what steps of a fixed shape serve at least


def cases():
    for name in NAMES:
        for before, after in PAIRS:
            slow = name in SLOW or (before, after) not in QUICK or not name.startswith(REMEMBER)
            yield pytest.param(name, before, after, marks=[pytest.mark.slow] if slow else [])


@pytest.fixture(scope="module")
def llama():
    model = make(tf.LlamaForCausalLM, tf.LlamaConfig)
    assert all(weights.requires_grad for weights in model.parameters())
    return model


@pytest.fixture(autouse=True)
def no_fault_goes_unseen(monkeypatch):
    """What a finalizer raises is only printed."""
    faults = []
    monkeypatch.setattr(sys, "unraisablehook", lambda fault: faults.append(fault.exc_value))
    yield
    gc.collect()
    assert not faults, faults


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def talk(model, name, before, after):
    """A prompt and some tokens in one mode, then all that a cache can be asked for in one or the other; the logits."""
    ids, said = tokens(2, 130, seed=7), []

    def go_on(cache, a, b):
        # a piece of more than 16 tokens is a prompt, shorter ones come one by one
        parts = ids[:, a:b].split(b - a if b - a > 16 else 1, 1)
        said.append(torch.cat([model(part, past_key_values=cache).logits.detach() for part in parts], 1))

    with before():
        session = attach(model, plan_of(name, model))
    with session:
        with before():
            cache = session.cache(130)
            go_on(cache, 0, 100)
            go_on(cache, 100, 102)
        with after():
            go_on(cache, 102, 104)
            go_on(cache, 104, 124)
            go_on(cache, 124, 127)
            cache.crop(-2)
            cache.reorder_cache(torch.tensor([1, 0]))
            go_on(cache, 125, 126)
            twin = cache.fork()
        with before():
            go_on(twin, 126, 128)
            twin.batch_select_indices(torch.tensor([1]))
            twin.batch_repeat_interleave(2)
        with after():
            go_on(cache, 127, 129)
            go_on(twin, 128, 129)
            # more room than there is
            step, served = session.steps(cache, room=150), True
            try:
                said.append(step(ids[:, :1]).clone())
            except UnsupportedError:
                assert name not in STEPS
                served = False
        with before():
            if served:
                said.append(step(ids[:, 1:2]).clone())
            step.close()
            go_on(cache, 2, 4)
            # more than there was room for
            go_on(cache, 0, 100)
            cache.reset()
        with after():
            go_on(cache, 0, 60)
            go_on(cache, 60, 62)
    return said


@pytest.fixture(scope="module")
def usual(llama):
    """What each method says where everything is done in one mode, made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = talk(llama, name, torch.no_grad, torch.no_grad)
        return made[name]

    return of


@pytest.mark.parametrize(("name", "before", "after"), list(cases()))
def test_a_cache_goes_on_in_any_mode(llama, usual, name, before, after):
    same(talk(llama, name, MODES[before], MODES[after]), usual(name))


@pytest.mark.parametrize(("before", "after"), [("inference", "no_grad"), ("inference", "grad")])
@pytest.mark.parametrize("name", ["quest", "hip", "recycled", "longheads"])
def test_beside_the_cache_of_transformers(llama, name, before, after):
    """What methods remember then lies in the session, not in the cache."""
    ids, found = tokens(2, 112, seed=3), []
    for first, second in ((torch.no_grad, torch.no_grad), (MODES[before], MODES[after])):
        with attach(llama, plan_of(name, llama)) as session:
            cache, said = tf.DynamicCache(config=llama.config), []
            for mode, part in zip((first, second) * 2, ids.split((100, 3, 4, 5), 1), strict=True):
                for token in part.split(100 if part.shape[1] == 100 else 1, 1):
                    with mode():
                        said.append(llama(token, past_key_values=cache).logits.detach())
            assert session.ways["other cache", 3] == 13
        found.append(said)
    same(*found)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_layers_that_keep_their_own_cache(before, after):
    kinds = ["sliding_attention", "full_attention"]
    model = make(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, num_hidden_layers=2, sliding_window=24, layer_types=kinds)
    ids, found = tokens(1, 104), []
    for first, second in ((torch.no_grad, torch.no_grad), (MODES[before], MODES[after])):
        with attach(model, plan_of("snapkv", model)) as session:
            cache, said = session.cache(), []
            for mode, part in zip((first, second, second, first, second), ids.split((100, 1, 1, 1, 1), 1), strict=True):
                with mode():
                    said.append(model(part, past_key_values=cache).logits.detach())
        found.append(said)
    same(*found)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("name", ["snapkv", "tidal", "offload-no_sink"])
def test_generates_on_a_prompt_that_was_read_in_inference_mode(llama, name, how):
    ids, found = tokens(3 if how else 1, 90), []
    # beams are rows: the prompt is there once for each
    ids = ids[:1].expand_as(ids)
    for mode in (torch.no_grad, torch.inference_mode):
        with attach(llama, plan_of(name, llama)) as session:
            cache = session.cache()
            with mode():
                llama(ids[:, :80], past_key_values=cache)
            found.append(llama.generate(ids[:1], past_key_values=cache, max_new_tokens=6, do_sample=False, **how))
    assert torch.equal(*found)


@pytest.mark.parametrize("length", [100, 3], ids=["prompt", "tokens"])
def test_gradients_through_tokens_that_lie_elsewhere(llama, length):
    """The blocks' places hold others when the backward pass comes: gradients are those of the model by itself."""
    ids, found = tokens(1, 250 + length, seed=5), []
    for name in ("dense", "offload-no_sink"):
        with attach(llama, plan_of(name, llama)) as session:
            cache = session.cache()
            with torch.inference_mode():
                llama(ids[:, :250], past_key_values=cache)
            llama.zero_grad()
            logits = llama(ids[:, 250:], past_key_values=cache).logits
            with torch.no_grad():
                # reads the same blocks in other places
                llama(ids[:, :40], past_key_values=cache.fork())
            logits.square().mean().backward()
            found.append([weights.grad.clone() for weights in llama.parameters()])
    llama.zero_grad()
    same(*found)


@pytest.mark.parametrize("collected", MODES)
@pytest.mark.parametrize("filled", MODES)
def test_a_tier_is_given_back_in_whatever_mode_its_cache_is_collected(llama, filled, collected):
    ids = tokens(2, 120)
    with attach(llama, plan_of("retrieval-flat+offload-no_sink", llama)) as session:
        with MODES[filled]():
            cache = session.cache()
            llama(ids, past_key_values=cache)
            llama(ids[:, :1], past_key_values=cache)
            twin = cache.fork()
        far = [held for layer in cache.layers for held in layer.store.memory[0].values() if isinstance(held, Far)]
        arenas, tiers = [held.tier.arena for held in far], [weakref.ref(held.tier) for held in far]
        assert len(arenas) == 4 and all(len(arena.free) < len(arena.owners) for arena in arenas)
        del far
        with MODES[collected]():
            # a cycle: only the collector gets at it
            cache.ring = cache
            del cache
            gc.collect()
            assert not any(tier() for tier in tiers)
            # the twin owns the same blocks
            assert all(len(arena.free) < len(arena.owners) for arena in arenas)
            llama(ids[:, 1:2], past_key_values=twin)
            del twin
            gc.collect()
        assert all(sorted(arena.free) == list(range(len(arena.owners))) for arena in arenas)
        assert not any(arena.owners.any() for arena in arenas)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_tier_by_itself(before, after):
    """A thread copies its blocks, and a thread is in no mode."""
    k, v = torch.randn(2, 3, 40, 5), torch.randn(2, 3, 40, 4)
    index = torch.arange(10).expand(2, 3, -1)
    with MODES[before]():
        tier = Tier(block=4, budget=1 << 14)
        tier.append(k[:, :, :20], v[:, :, :20])
        tier.fetch(index[..., :5])
    with MODES[after]():
        tier.append(k[:, :, 20:], v[:, :, 20:])
        got = tier.fetch(index)
        torch.testing.assert_close(got, (k, v), atol=0, rtol=0)
        # a place for half of them
        for piece in tier.sweep(index):
            torch.testing.assert_close(
                piece.k, k[piece.rows, piece.heads, piece.blocks.start * 4 : piece.blocks.stop * 4]
            )
        rows = tier.select(torch.tensor([1]))
        tier.crop(2)
    with MODES[before]():
        torch.testing.assert_close(rows.fetch(index[:1]), (k[1:], v[1:]), atol=0, rtol=0)
        tier.close()


class Products:
    """A policy that forms products as they come, without a thought of gradients."""

    def keep(self, q, k, v, call):
        best = (q[:, ::2] @ k.transpose(-1, -2)).softmax(-1).sum(2)[..., :-20].topk(20).indices.sort(-1).values
        return torch.cat((best, torch.arange(k.shape[2] - 20, k.shape[2]).expand(*best.shape[:2], -1)), 2)

    def fold(self, k, v, bias, slots, call):
        return None


@pytest.mark.parametrize("policy", [SnapKV(capacity=40, window=6, kernel=3), Products()], ids=["snapkv", "products"])
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_store_by_itself(before, after, policy):
    """Grown, evicted, with queries that wait from one mode to the other."""

    def fill(*modes):
        rng = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, heads, 300, 8, generator=rng).requires_grad_() for heads in (4, 2, 2))
        with modes[0]():
            store = Store([((0, 1), policy)], 2)
        for at, (a, b) in enumerate([(0, 60), (60, 62), (62, 63), (63, 250), (250, 252), (252, 300)]):
            with modes[at % 2]():
                # as a model makes them: in the mode of the call
                mine = [t[:, :, a:b] * 1.0 for t in (q, k, v)]
                store.append(*mine[1:])
                store.asked([mine[0]], b - a > 16)
                if at == 2:
                    store.select(torch.tensor([1, 1, 0]))
                    q, k, v = (t[[1, 1, 0]] for t in (q, k, v))
                if at == 4:
                    store = store.fork()
        with modes[0]():
            store.settle()
            return [t.detach() for view in store.views() for t in (view.k, view.v, view.pos) if t is not None]

    same(fill(MODES[before], MODES[after]), fill(torch.no_grad, torch.no_grad))


LAYERS = {name: layer for name, layer in instances().items() if isinstance(layer, Layer)}


@pytest.mark.parametrize(("before", "after"), PAIRS)
@pytest.mark.parametrize("name", [*LAYERS, "attention"])
def test_the_state_of_a_layer(name, before, after):
    layer = Attention(64, 4).double().eval() if name == "attention" else LAYERS[name]
    x = torch.randn(2, 40, layer.o_proj.weight.shape[0], dtype=torch.float64)
    found = []
    for modes in ((torch.no_grad, torch.no_grad), (MODES[before], MODES[after])):
        state, said = None, []
        for at, part in enumerate(x.split((20, 1, 1, 18), 1)):
            with modes[at % 2]():
                out = layer(part, state)
            state = out.state
            said.append(out.y.detach())
            if out.y.requires_grad:
                out.y.sum().backward(retain_graph=True)
        found.append(said)
    layer.zero_grad()
    same(*found)


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_a_recurrent_state_is_trained_on(impl):
    """The kernels keep it for the backward pass."""
    if impl == "triton":
        pytest.importorskip("triton", reason="the kernels need Triton, which has no wheel for this platform")
    q, k, v = torch.randn(3, 1, 2, 40, 16).unbind()
    decay, found = torch.tensor([-0.1, -0.02]), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            state = scan(q, k, v, decay, None, impl=impl)[1]
        more = q.clone().requires_grad_()
        scan(more, k, v, decay, state, impl=impl)[0].square().mean().backward()
        found.append([more.grad])
    same(*found)
