"""attach on tiny random models of transformers: dense equals sdpa everywhere, sparse does what it says, no trace."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch
import transformers as tf
from transformers import DynamicCache

from saccade import Assign, Plan, attach
from saccade.core.errors import InputError, PlanError, UnsupportedError
from saccade.core.plan import ModelShape
from saccade.methods.policy.duo import DuoAttention

TINY = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
HYBRID = ["sliding_attention", "full_attention", "full_attention"]
MODELS = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, {}, [0, 1, 2]),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, dict(head_dim=16), [0, 1, 2]),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig, dict(sliding_window=8), []),
    "gemma3": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig,
        dict(head_dim=24, sliding_window=8, layer_types=HYBRID),
        [1, 2],
    ),
    "phi3": (tf.Phi3ForCausalLM, tf.Phi3Config, {}, [0, 1, 2]),
    "phi": (tf.PhiForCausalLM, tf.PhiConfig, {}, [0, 1, 2]),
}


def make(name, **more):
    cls, config, extra, _ = MODELS[name]
    torch.manual_seed(0)
    return cls(config(**{**TINY, **extra, **more})).eval()


@pytest.fixture(scope="module")
def models():
    return {name: make(name) for name in MODELS}


@pytest.fixture(scope="module")
def llama():
    return make("llama")


def prompt(B=1, N=40, seed=0):
    return torch.randint(3, 97, (B, N), generator=torch.Generator().manual_seed(seed))


PADDED, MASK = prompt(2), torch.ones(2, 40, dtype=torch.long)
PADDED[0, :7], MASK[0, :7] = 0, 0
REPEATED = torch.tensor([[5, 6, 7, 8, 9] * 6])
GREEDY = dict(max_new_tokens=12, do_sample=False)


def generate(model, ids, cache=None, **kwargs):
    with torch.no_grad():
        return model.generate(ids, past_key_values=cache, **{**GREEDY, **kwargs})


def forward(model, ids, cache=None, cuts=(), **kwargs):
    """Logits of all tokens, fed in pieces that end at the cuts."""
    edges, outs = [0, *cuts, ids.shape[1]], []
    with torch.no_grad():
        for a, b in pairwise(edges):
            mask = kwargs.get("attention_mask")
            mask = {} if mask is None else {"attention_mask": mask[:, :b]}
            outs.append(model(ids[:, a:b], past_key_values=cache, use_cache=cache is not None, **mask).logits)
    return torch.cat(outs, 1)


def lookup(model, cache, monkeypatch):
    """Prompt-lookup decoding, and the lengths of its calls."""
    lengths, real = [], type(model).forward

    def counted(self, input_ids=None, **kwargs):
        lengths.append(input_ids.shape[1])
        return real(self, input_ids=input_ids, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", counted)
        out = generate(model, REPEATED, cache, prompt_lookup_num_tokens=4)
    return out, lengths


def everything(model, cache, monkeypatch):
    verified, lengths = lookup(model, cache(), monkeypatch)
    assert any(2 <= n <= 5 for n in lengths[1:]), f"no draft was ever verified: {lengths}"
    return {
        "logits": forward(model, PADDED, cache(), attention_mask=MASK)[MASK.bool()],
        "left padding": generate(model, PADDED, cache(), attention_mask=MASK),
        "beams": generate(model, PADDED, cache(), attention_mask=MASK, num_beams=3),
        "chunked": generate(model, prompt(), cache(), prefill_chunk_size=16),
        "lookup": verified,
    }


def close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_dense_equals_sdpa(name, models, monkeypatch):
    model = models[name]
    want = everything(model, lambda: DynamicCache(config=model.config), monkeypatch)
    with attach(model, Plan.uniform(model)) as session:
        assert session.served() == MODELS[name][3]
        close(everything(model, session.cache, monkeypatch), want)
        close(everything(model, lambda: DynamicCache(config=model.config), monkeypatch), want)
        calls = set(session.calls[at] for at in session.served())
        assert len(calls) <= 1 and 0 not in calls
        assert all(session.calls[at] == 0 for at in session.calls if at not in session.served())


def test_sliding_layers_keep_their_own_attention(models):
    model = models["gemma3"]
    want = forward(model, prompt())
    with attach(model, Plan.uniform(model, prefill=("streaming", {"sink": 0, "recent": 1}))) as session:
        got = forward(model, prompt(), session.cache())
        kinds = [type(layer).__name__ for layer in session.cache().layers]
    assert not torch.allclose(got, want, atol=1e-5)
    assert kinds == ["DynamicSlidingWindowLayer", "StoreLayer", "StoreLayer"]


def test_a_plan_that_would_serve_nothing_is_refused(models):
    before = models["mistral"].config._attn_implementation
    with pytest.raises(UnsupportedError, match=r"serve nothing: layers \[0, 1, 2\] of Mistral.*sliding windows"):
        attach(models["mistral"], Plan.uniform(models["mistral"], prefill="streaming"))
    assert models["mistral"].config._attn_implementation == before
    rows = [(Assign(None, "streaming", {}, "prefill"),), (), ()]
    with pytest.raises(UnsupportedError, match=r"layers \[0\] of Gemma3.*can serve \[1, 2\]"):
        attach(models["gemma3"], Plan.per_head(models["gemma3"], rows))


def test_a_window_that_nothing_leaves_is_served(monkeypatch):
    """Phi-3 with 128k tokens has a window of 262144: plainly causal, in our cache and in transformers' own."""
    cls, config, *_ = MODELS["phi3"]
    torch.manual_seed(0)
    model = cls(config(**TINY, sliding_window=TINY["max_position_embeddings"])).eval()
    want = everything(model, lambda: DynamicCache(config=model.config), monkeypatch)
    with attach(model, Plan.uniform(model)) as session:
        assert session.served() == [0, 1, 2]
        close(everything(model, session.cache, monkeypatch), want)
        close(everything(model, lambda: DynamicCache(config=model.config), monkeypatch), want)
        assert {way for way, _ in session.ways} == {"store", "other cache", "no cache"} - (
            set() if ("no cache", 0) in session.ways else {"no cache"}
        )
    with attach(model, Plan.uniform(model, prefill=("streaming", {"sink": 0, "recent": 1}))) as session:
        assert not torch.allclose(forward(model, prompt(), session.cache()), forward(model, prompt()[:, :1]), atol=1e-5)
        # a mask of the caller's own is not causality
        own = torch.ones(2, 1, 30, 30, dtype=torch.bool).tril()
        forward(model, prompt(2, 30), attention_mask=own)
        assert session.ways["own mask", 0] == 1


def test_a_model_that_names_its_cache_otherwise(monkeypatch):
    torch.manual_seed(0)
    shape = {name: size for name, size in TINY.items() if name != "num_key_value_heads"}
    model = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**shape)).eval()
    want = everything(model, lambda: DynamicCache(config=model.config), monkeypatch)
    with attach(model, Plan.uniform(model)) as session:
        close(everything(model, session.cache, monkeypatch), want)
        assert session.ways["store", 0]


def test_what_is_no_plan_and_no_decoder_is_refused(llama):
    for wrong in (None, "minference", {"layers": []}):
        with pytest.raises(InputError, match=f"needs a Plan, got {type(wrong).__name__}"):
            attach(llama, wrong)
    with pytest.raises(UnsupportedError, match="no config"):
        attach(torch.nn.Linear(2, 2), Plan.uniform(llama))
    with pytest.raises(UnsupportedError, match="not a model of transformers"):
        attach(None, Plan.uniform(llama))
    small = tf.T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, vocab_size=64)
    t5 = tf.T5ForConditionalGeneration(small).eval()
    with pytest.raises(UnsupportedError, match="encoder"):
        attach(t5, Plan.uniform(ModelShape(1, 2, 2)))
    with attach(llama, Plan.uniform(llama)) as session:
        for wrong in ("x", -1, 1.5, True):
            with pytest.raises(InputError, match="length must be an int >= 0"):
                session.cache(wrong)


@pytest.mark.parametrize("own", [True, False])
def test_under_autocast_it_is_what_torch_s_attention_is(llama, own):
    with torch.autocast("cpu", torch.bfloat16):
        want = forward(llama, prompt())
        with attach(llama, Plan.uniform(llama)) as session:
            got = forward(llama, prompt(), session.cache() if own else DynamicCache(config=llama.config))
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.float(), want.float(), atol=0.05, rtol=0.05)


def test_a_method_that_must_see_every_query_is_not_given_half_of_them(llama):
    args = {"keys": 32, "chunk": 8}
    for phase, missing in (("prefill", "decode"), ("decode", "prefill")):
        with pytest.raises(PlanError, match=f"LongHeads: layer 0 has it not for {missing}"):
            attach(llama, Plan.uniform(llama, **{phase: ("longheads", args)}))
    other = ("longheads", {"keys": 64, "chunk": 8})
    with pytest.raises(PlanError, match="same heads and arguments"):
        attach(llama, Plan.uniform(llama, prefill=("longheads", args), decode=other))
    policy = ("duo", {"sink": 4, "recent": 16})
    for phases in ({"decode": ("longheads", args)}, {"cache": policy}):
        attach(llama, Plan.uniform(llama, prefill=("longheads", args), **phases)).detach()


@pytest.mark.parametrize("padding", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("own", [True, False])
def test_padded_rows_equal_the_rows_alone(llama, padding, own):
    ids, mask = prompt(2, 30), torch.ones(2, 30, dtype=torch.long)
    if padding in ("left", "both"):
        mask[0, :9] = 0
    if padding in ("right", "both"):
        mask[1, -9:] = 0
    if padding == "holes":
        mask[0, 4:6], mask[1, 11:20] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    plan = Plan.uniform(llama, prefill=("streaming", {"sink": 2, "recent": 5}))
    with attach(llama, plan) as session, torch.no_grad():
        cache = session.cache() if own else DynamicCache(config=llama.config)
        got = llama(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        for row in (0, 1):
            real = mask[row].bool()
            alone = llama(ids[row : row + 1, real], past_key_values=session.cache()).logits[0]
            torch.testing.assert_close(got[row, real], alone, atol=1e-5, rtol=1e-4)


def test_a_row_of_pure_padding(llama):
    ids, mask = prompt(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1] = 0
    want = forward(llama, ids[:1])
    with attach(llama, Plan.uniform(llama)) as session:
        with pytest.raises(InputError, match="row 1 is padding from end to end"):
            forward(llama, ids, session.cache(), attention_mask=mask)
        got = forward(llama, ids, DynamicCache(config=llama.config), attention_mask=mask)
        assert got.isfinite().all()
        torch.testing.assert_close(got[:1], want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(forward(llama, ids[:1], session.cache()), want, atol=1e-5, rtol=1e-4)


def trace(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    keys = [sorted(vars(m)) for m in model.modules()]
    return hooks, keys, model.config._attn_implementation, model.config.to_dict(), {**model.state_dict()}.keys()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_detaching_leaves_no_trace(name, implementation):
    model = make(name)
    model.set_attn_implementation(implementation)
    before, want = trace(model), forward(model, prompt())
    session = attach(model, Plan.uniform(model, prefill=("streaming", {"sink": 1, "recent": 2})))
    assert trace(model) != before
    changed = forward(model, prompt(), session.cache())
    session.detach()
    session.detach()
    assert trace(model) == before
    assert torch.equal(forward(model, prompt()), want)
    assert not torch.allclose(changed, want, atol=1e-3)


def test_a_session_keeps_no_cache_and_no_model_alive():
    model = make("llama")
    session = attach(model, Plan.uniform(model))
    cache = session.cache()
    generate(model, prompt(), cache)
    seen = weakref.ref(cache)
    del cache
    gc.collect()
    assert seen() is None
    session.detach()
    gone = weakref.ref(model)
    del model, session
    gc.collect()
    assert gone() is None


def test_attached_twice_is_refused_and_changes_nothing(llama):
    before = trace(llama)
    with attach(llama, Plan.uniform(llama)) as session:
        with pytest.raises(InputError, match="already has a plan"):
            attach(llama, Plan.uniform(llama))
        assert session.calls and forward(llama, prompt(), session.cache()).isfinite().all()
    assert trace(llama) == before


def test_an_exception_inside_leaves_the_model_detachable(llama):
    before, want = trace(llama), forward(llama, prompt())

    class Stop(Exception):
        pass

    def stop(seen):
        if seen.call.layer == 1:
            raise Stop

    with pytest.raises(Stop), attach(llama, Plan.uniform(llama)) as session:
        session.watch = stop
        generate(llama, prompt(), session.cache())
    assert trace(llama) == before
    assert torch.equal(forward(llama, prompt()), want)
    with attach(llama, Plan.uniform(llama)) as session:
        cache = session.cache()
        session.watch = stop
        with pytest.raises(Stop):
            forward(llama, prompt(), cache)
        # the same session goes on with a new cache, or with the old one after a reset
        session.watch = None
        torch.testing.assert_close(forward(llama, prompt(), session.cache()), want, atol=1e-5, rtol=1e-4)
        cache.reset()
        torch.testing.assert_close(forward(llama, prompt(), cache), want, atol=1e-5, rtol=1e-4)
        session.watch, cache = stop, session.cache()
        with pytest.raises(Stop):
            forward(llama, prompt(), cache)
    kept = weakref.ref(cache)
    del cache
    gc.collect()
    assert kept() is None


SPARSE = {
    "streaming": dict(prefill=("streaming", {"sink": 2, "recent": 7}), decode=("streaming", {"sink": 2, "recent": 7})),
    "duo": dict(cache=("duo", {"sink": 2, "recent": 7})),
    "streaming over duo": dict(
        prefill=("streaming", {"sink": 1, "recent": 4}),
        decode=("streaming", {"sink": 1, "recent": 4}),
        cache=("duo", {"sink": 2, "recent": 7}),
    ),
}


def half_duo(model, sink=2, recent=7):
    row = [Assign((1,), "duo", {"sink": sink, "recent": recent}, "cache")]
    return Plan.per_head(model, [row] * 3)


def by_heads(model):
    """Other methods for other heads; not in order, not in whole groups."""
    near = {"sink": 1, "recent": 5}
    row = [Assign((3, 0), "streaming", near, phase) for phase in ("prefill", "decode")]
    return Plan.per_head(model, [row, [], [*row, Assign((0,), "duo", {"sink": 1, "recent": 30}, "cache")]])


def sparse_plans(model):
    return {name: Plan.uniform(model, **phases) for name, phases in SPARSE.items()} | {
        "half duo": half_duo(model),
        "by heads": by_heads(model),
    }


def masked_logits(model, plan, ids):
    """The plan's windows as masks per layer and head, in a forward by eager attention: nothing of ours but the plan."""
    N, masks = ids.shape[1], []
    i, j = torch.arange(N)[:, None], torch.arange(N)
    for layer in range(plan.model.layers):
        mask = (j <= i).repeat(plan.model.heads, 1, 1)
        for phase in ("cache", "prefill"):
            for assign in plan.phase(layer, phase):
                share = plan.model.heads // plan.model.kv_heads if phase == "cache" else 1
                count = plan.model.heads // share
                args = assign.args
                for unit in range(count) if assign.heads is None else assign.heads:
                    for h in range(unit * share, unit * share + share):
                        mask[h] = (j <= i) & ((j < args["sink"]) | (i - j < args["recent"]))
        masks.append(mask)

    def hook(layer):
        def before(module, args, kwargs):
            bias = torch.zeros(1, *masks[layer].shape).masked_fill(~masks[layer], float("-inf"))
            return args, {**kwargs, "attention_mask": bias}

        return before

    handles = [
        block.self_attn.register_forward_pre_hook(hook(at), with_kwargs=True)
        for at, block in enumerate(model.model.layers)
    ]
    try:
        return forward(model, ids)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", [*SPARSE, "half duo", "by heads"])
def test_any_way_to_feed_a_sparse_plan_equals_its_masks(llama, name):
    plan, ids = sparse_plans(llama)[name], prompt(N=60)
    want = masked_logits(llama, plan, ids)
    assert not torch.allclose(want, forward(llama, ids), atol=1e-3)
    with attach(llama, plan) as session:
        for cuts in [(), (59,), (20, 40), (30, 31, 32, 33), range(17, 60), (40, 44, 50)]:
            torch.testing.assert_close(forward(llama, ids, session.cache(), cuts), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*SPARSE, "half duo", "by heads"])
def test_generation_under_a_sparse_plan(llama, name, monkeypatch):
    plan = sparse_plans(llama)[name]
    with attach(llama, plan) as session:
        greedy = generate(llama, REPEATED, session.cache())
        # greedy decoding, each token from a new forward over everything so far
        ids = REPEATED
        for _ in range(GREEDY["max_new_tokens"]):
            ids = torch.cat((ids, forward(llama, ids, session.cache())[:, -1:].argmax(-1)), 1)
        assert torch.equal(greedy, ids)
        verified, lengths = lookup(llama, session.cache(), monkeypatch)
        assert any(2 <= n <= 5 for n in lengths[1:]), lengths
        assert torch.equal(verified, greedy)
        assert torch.equal(generate(llama, REPEATED, session.cache(), prefill_chunk_size=16), greedy)
        beams = generate(llama, PADDED, session.cache(), attention_mask=MASK, num_beams=3, num_return_sequences=2)
        for row in (0, 1):
            alone = PADDED[row : row + 1, MASK[row].bool()]
            one = generate(llama, alone, session.cache(), num_beams=3, num_return_sequences=2)
            assert torch.equal(beams[2 * row : 2 * row + 2, 40:], one[:, alone.shape[1] :])


def test_prompt_lookup_drafts_come_with_the_prompt(llama, monkeypatch):
    # the first call holds the prompt and a draft; what it evicts must not be what the rejected draft pushed out
    with attach(llama, Plan.uniform(llama, cache=("duo", {"sink": 1, "recent": 3}))) as session:
        greedy = generate(llama, REPEATED, session.cache())
        verified, lengths = lookup(llama, session.cache(), monkeypatch)
        assert lengths[0] > REPEATED.shape[1]
        assert torch.equal(verified, greedy)


def test_duo_bytes(llama):
    ids = prompt(N=400)
    with attach(llama, Plan.uniform(llama)) as session:
        dense = session.cache()
        forward(llama, ids, dense)
    with attach(llama, half_duo(llama)) as session:
        cache = session.cache()
        assert cache.bytes() == 0
        forward(llama, ids, cache)
        assert cache.bytes() <= 0.6 * dense.bytes()
        assert cache.get_seq_length() == 400
        keys, values, pos = cache.materialize(layer=1, kv_head=1)
        most = DuoAttention(2, 7).claim(400)
        assert pos.tolist() == [0, 1, *range(400 - most + 2, 400)] and len(keys) == len(values) == most
        assert torch.equal(cache.materialize(1, 0)[2], torch.arange(400))
        with pytest.raises(IndexError, match="no key head 2"):
            cache.materialize(1, 2)


def test_tidal_decodes_within_its_budget(llama):
    plan, ids, seen = Plan.uniform(llama, decode=("tidal", {"budget": 8, "first": 0, "correct": 9})), prompt(2), []
    with attach(llama, plan) as session:
        session.watch = lambda s: seen.append((s.call.layer, s.call.shape.N, s.pattern.mask(s.call).sum(-1).max()))
        for mask in (None, MASK):
            seen.clear()
            kwargs = {} if mask is None else {"attention_mask": mask}
            both = generate(llama, ids, session.cache(), **kwargs)
            assert {int(most) for layer, n, most in seen if n == 1 and layer > 0} == {8}
            rows = torch.ones_like(MASK) if mask is None else mask
            for row in (0, 1):
                alone = ids[row : row + 1, rows[row].bool()]
                assert torch.equal(generate(llama, alone, session.cache())[0, alone.shape[1] :], both[row, 40:])
        theirs = generate(llama, ids, DynamicCache(config=llama.config), attention_mask=MASK)
        assert torch.equal(theirs, both)


def test_two_requests_that_take_turns(llama):
    plan = Plan.uniform(llama, prefill="pooled", decode=("tidal", {"budget": 8, "first": 0, "correct": 1}))
    ids = [prompt(seed=1), prompt(seed=2)]
    with attach(llama, plan) as session:
        want = [forward(llama, t, session.cache(), range(30, 40)) for t in ids]
        caches, got = [session.cache(), session.cache()], ([], [])
        for a, b in [(0, 30), *((i, i + 1) for i in range(30, 40))]:
            for which in (0, 1):
                got[which].append(forward(llama, ids[which][:, a:b], caches[which]))
        for out, expected in zip(got, want, strict=True):
            torch.testing.assert_close(torch.cat(out, 1), expected, atol=1e-6, rtol=1e-5)


def test_two_models_side_by_side(llama, models):
    other = make("llama")
    with attach(llama, Plan.uniform(llama)) as one, attach(other, Plan.uniform(other)) as two:
        forward(llama, prompt(), one.cache())
        assert one.calls == {0: 1, 1: 1, 2: 1} and two.calls == {0: 0, 1: 0, 2: 0}


def test_what_a_method_is_told(llama):
    seen = []
    with attach(llama, Plan.uniform(llama)) as session:
        session.watch = seen.append
        cache = session.cache()
        forward(llama, prompt(), cache, (30,))
    assert [(s.call.layer, s.call.shape.N, s.call.shape.M) for s in seen] == [
        *((layer, 30, 30) for layer in range(3)),
        *((layer, 10, 40) for layer in range(3)),
    ]
    assert all(s.call.x.shape == (1, s.call.shape.N, 64) for s in seen)
    assert all(s.call.scale == llama.model.layers[0].self_attn.scaling for s in seen)
    assert seen[0].call.step is seen[2].call.step and seen[0].call.step is not seen[3].call.step
    assert seen[0].call.memory is seen[3].call.memory and seen[0].call.memory is not seen[1].call.memory


def test_cache_operations_as_transformers_calls_them(llama):
    ids = prompt(2)
    with attach(llama, Plan.uniform(llama, cache=("duo", {"sink": 2, "recent": 9}))) as session:
        want = forward(llama, ids, session.cache())
        cache = session.cache()
        forward(llama, ids[:, :30], cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(forward(llama, ids[[1, 0], 30:32], cache), want[[1, 0], 30:32], atol=1e-5, rtol=1e-4)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        torch.testing.assert_close(forward(llama, ids[:, 32:36], cache), want[:, 32:36], atol=1e-5, rtol=1e-4)
        cache.crop(-3)
        assert cache.get_seq_length() == 33
        torch.testing.assert_close(forward(llama, ids[:, 33:], cache), want[:, 33:], atol=1e-5, rtol=1e-4)
        assert cache.get_mask_sizes(2, 0) == (42, 0)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.bytes() == 0
        torch.testing.assert_close(forward(llama, ids, cache), want, atol=1e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="minus"):
            cache.layers[0].crop(3)
        with pytest.raises(UnsupportedError, match="offload"):
            cache.layers[0].offload()


def test_multi_turn(llama):
    ids = prompt(2, 60)
    plan = Plan.uniform(llama, cache=("duo", {"sink": 2, "recent": 9}))
    with attach(llama, plan) as session:
        cache = session.cache()
        first = generate(llama, ids[:, :20], cache, max_new_tokens=5)
        longer = torch.cat((first, ids[:, 20:40]), 1)
        second = generate(llama, longer, cache, max_new_tokens=5)
        assert torch.equal(second, generate(llama, longer, session.cache(), max_new_tokens=5))


@pytest.mark.parametrize("n", [1, 6])
def test_a_mask_of_the_caller_s_own(llama, n):
    # numbers to add to the logits: 0 for what is seen
    def masked(cache):
        forward(llama, prompt(), cache)
        own = torch.zeros(1, 1, n, 40 + n)
        own[..., 5:20] = float("-inf")
        with torch.no_grad():
            return llama(prompt(N=n), past_key_values=cache, attention_mask=own).logits

    want = masked(DynamicCache(config=llama.config))
    with attach(llama, Plan.uniform(llama)) as session:
        torch.testing.assert_close(masked(DynamicCache(config=llama.config)), want, atol=1e-5, rtol=1e-4)
        with pytest.raises(UnsupportedError, match="more than causality and padding"):
            masked(session.cache())


def test_static_cache(llama):
    want = generate(llama, PADDED, attention_mask=MASK)
    with attach(llama, Plan.uniform(llama)):
        got = generate(llama, PADDED, attention_mask=MASK, cache_implementation="static")
    assert torch.equal(got, want)


def test_a_cache_policy_needs_our_cache(llama):
    with attach(llama, Plan.uniform(llama, cache="duo")) as session:
        for run in (lambda: forward(llama, prompt()), lambda: generate(llama, prompt())):
            with pytest.raises(InputError, match=r"session\.cache\(\)"):
                run()
        forward(llama, prompt(), session.cache())


def test_our_cache_without_a_session(llama):
    """The first call says so: one that went through would have looked at its own tokens alone."""
    with attach(llama, Plan.uniform(llama)) as session:
        empty, filled = session.cache(), session.cache()
        want = forward(llama, prompt(), session.cache(), (39,))
        forward(llama, prompt()[:, :39], filled)
    for cache, ids in ((empty, prompt()), (filled, prompt()[:, 39:])):
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="attach"):
                forward(llama, ids, cache)
    # neither call has left anything behind
    with attach(llama, Plan.uniform(llama)):
        assert torch.equal(forward(llama, prompt()[:, 39:], filled), want[:, 39:])
        assert torch.equal(forward(llama, prompt(), empty, (39,)), want)


def test_layers_that_a_call_leaves_out_are_no_fault(llama, monkeypatch):
    """A model may go past a layer, or end early; the others still go together."""
    monkeypatch.setattr(llama.model.layers[1].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with attach(llama, Plan.uniform(llama)) as session:
        cache = session.cache()
        assert torch.equal(
            forward(llama, prompt(), cache, (30, 39)), forward(llama, prompt(), session.cache(), (30, 39))
        )
        assert [layer.get_seq_length() for layer in cache.layers] == [40, 0, 40]


def test_a_call_that_was_refused_may_be_made_again_as_it_should_be(llama):
    with attach(llama, Plan.uniform(llama)) as session:
        cache, want = session.cache(), forward(llama, prompt(), session.cache(), (39,))
        forward(llama, prompt()[:, :39], cache)
        with pytest.raises(UnsupportedError, match="more than causality"), torch.no_grad():
            llama(prompt()[:, 39:], past_key_values=cache, attention_mask=torch.zeros(1, 1, 1, 40))
        assert torch.equal(forward(llama, prompt()[:, 39:], cache), want[:, 39:])


def test_a_cache_that_a_call_left_half_filled_is_not_read(llama):
    """Some layers would read the tokens of the call that broke off twice."""
    with attach(llama, Plan.uniform(llama)) as session:
        cache = session.cache()
        forward(llama, prompt(), cache)

        def stop(seen):
            if seen.call.layer == 1:
                raise KeyboardInterrupt

        session.watch = stop
        with pytest.raises(KeyboardInterrupt):
            forward(llama, prompt(N=3, seed=1), cache)
        session.watch = None
        for _ in range(2):
            with pytest.raises(InputError, match=r"layer 2 .*broke off"):
                forward(llama, prompt(N=3, seed=1), cache)
        cache.reset()
        forward(llama, prompt(), cache)


def test_plans_for_another_model(llama):
    before = trace(llama)
    other = make("llama", num_hidden_layers=2)
    with pytest.raises(PlanError, match=r"2 layers.*the model has.*3 layers"):
        attach(llama, Plan.uniform(other))
    with pytest.raises(PlanError, match=r"4 kv heads.*2 kv heads"):
        attach(llama, Plan.uniform(make("llama", num_key_value_heads=4)))
    assert trace(llama) == before


def test_a_method_that_needs_the_whole_store_beside_one_that_evicts(llama):
    plan = Plan.uniform(llama, decode=("tidal", {"budget": 4, "first": 0}), cache="duo")
    with pytest.raises(PlanError, match="TidalDecode needs every token"):
        attach(llama, plan)


def test_models_that_are_not_served():
    torch.manual_seed(0)
    capped = tf.Gemma2ForCausalLM(tf.Gemma2Config(**TINY, head_dim=16, attn_logit_softcapping=50.0)).eval()
    before = trace(capped)
    with pytest.raises(UnsupportedError, match=r"caps its attention logits \(attn_logit_softcapping=50"):
        attach(capped, Plan.uniform(capped))
    assert trace(capped) == before
    with pytest.raises((UnsupportedError, PlanError), match="Linear"):
        attach(torch.nn.Linear(2, 2), Plan.uniform(make("llama")))


def test_gemma2_without_its_cap():
    torch.manual_seed(0)
    config = tf.Gemma2Config(**TINY, head_dim=16, attn_logit_softcapping=None, sliding_window=8)
    model = tf.Gemma2ForCausalLM(config).eval()
    want = forward(model, prompt())
    with attach(model, Plan.uniform(model)) as session:
        torch.testing.assert_close(forward(model, prompt(), session.cache()), want, atol=1e-5, rtol=1e-4)


def test_dropout_is_refused():
    model = make("llama", attention_dropout=0.5).train()
    with attach(model, Plan.uniform(model)), pytest.raises(UnsupportedError, match=r"dropout \(0\.5\)"):
        model(prompt())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(checkpointing):
    model, ids = make("llama").train(), prompt(2, 30)
    plan = Plan.uniform(model, prefill=("streaming", {"sink": 2, "recent": 40}))

    def grads():
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    want = grads()
    if checkpointing:
        # the name before transformers 5.23
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
    with attach(model, plan):
        got = grads()
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = make("llama").to(dtype)
    exact = forward(make("llama"), prompt())
    theirs = (forward(model, prompt()).float() - exact).abs().max()
    with attach(model, Plan.uniform(model)) as session:
        for cuts in [(), (30,), range(35, 40)]:
            ours = (forward(model, prompt(), session.cache(), cuts).float() - exact).abs().max()
            assert ours <= 2 * theirs


def test_nan_in_the_weights_is_found_where_it_is(llama):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = float("nan")
    with attach(model, Plan.uniform(model)) as session, pytest.raises(InputError, match=r"NaN.*layer 1"):
        forward(model, prompt(), session.cache())


def test_length_rules_follow_the_prompt(llama):
    rule, seen = {"base": 4, "slope": 0.1}, []
    plan = Plan.uniform(llama, prefill=("streaming", {"sink": 0, "recent": rule}))
    with attach(llama, plan) as session:
        session.watch = lambda s: seen.append(s.pattern.recent)
        for N in (20, 60):
            forward(llama, prompt(N=N), session.cache())
        forward(llama, prompt(N=60), DynamicCache(config=llama.config))
    assert seen == [6] * 3 + [10] * 3 + [10] * 3
    evicting = Plan.uniform(llama, cache=("duo", {"sink": 0, "recent": rule}))
    with attach(llama, evicting) as session:
        policy = session.cache(length=1000).layers[0].store.policies[0][1]
        assert policy.recent == 104
        with pytest.raises(InputError, match="what the plan keeps depends on the length"):
            session.cache()
