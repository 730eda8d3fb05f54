"""What is true of Offload: nothing is lost, the store's bytes fall, and no method overlooks what is far."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saccade import Assign, Plan, attach
from saccade.cache import arena as arena_module
from saccade.cache.far import far_of
from saccade.cache.store import DRAFT, Store, call_for
from saccade.cache.tier import Tier
from saccade.core.errors import InputError, PlanError, SpaceError, UnsupportedError
from saccade.core.plan import ModelShape
from saccade.core.table import build
from saccade.evaluate.presets import preset
from saccade.methods.apply import apply
from saccade.methods.policy import offload as offload_module
from saccade.methods.policy.offload import Offload
from saccade.testing.checks import draft_in_the_prompt
from saccade.testing.inputs import Feed, run, stream

SMALL = dict(sink=3, recent=11, block=7)


def dense(sequence):
    q, k, v = (t.squeeze(1) for t in sequence[:3])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("cache", [7 * 32 * 8 + 8, 7 * 32 * 8 * 5, 1 << 20])
@pytest.mark.parametrize("pieces", [[150], [90, 60], [17, 60, 1, 1, 16, 20, 35], [140, *[1] * 10]])
@pytest.mark.parametrize("file", [False, True])
def test_dense_whatever_is_far(pieces, cache, file, tmp_path):
    sequence = stream(150)
    method = Offload(**SMALL, cache=cache, folder=str(tmp_path) if file else None)
    torch.testing.assert_close(run(method, sequence, pieces)[0], dense(sequence), atol=1e-9, rtol=1e-9)


def test_the_stores_bytes_fall_and_the_tier_holds_the_rest():
    sequence, feed = stream(2000, layers=1), Feed(Offload(**SMALL, cache=100_000), layers=1)
    store = feed.stores[0]
    feed(sequence.part(0, 1900))
    whole = 1900 * 2 * 32 * 8
    assert store.bytes() < whole / 4
    far = next(held for held in store.memory[0].values())
    held = store.views()[0].k.shape[2]
    assert held + far.tier.tokens == 1900 and held <= Offload(**SMALL).claim(1900) == 3 + 11 + DRAFT + 6
    assert far.tier.near_bytes() <= 100_000
    assert far.bytes() <= store.state_bytes() and far.tier.far_bytes() >= whole * 0.9
    # bit for bit, in order, from the sinks on
    k, v = far.tier.rows(torch.arange(far.tier.tokens).expand(1, 2, -1))
    assert torch.equal(k, sequence.k[0][:, :, 3 : 3 + far.tier.tokens])
    assert torch.equal(v, sequence.v[0][:, :, 3 : 3 + far.tier.tokens])
    store.reset()
    assert store.state_bytes() == 0


def test_no_space_keeps_the_tokens_in_the_store():
    sequence = stream(300, layers=1)
    feed = Feed(Offload(**SMALL, cache=1 << 20, limit=2 * 20 * 7 * 32 * 8), layers=1)
    feed(sequence.part(0, 120))
    with pytest.raises(SpaceError, match="raise the limit"):
        feed(sequence.part(120, 299))
    store = feed.stores[0]
    far, view = store.memory[0][next(iter(store.memory[0]))], store.views()[0]
    assert view.k.shape[2] + far.tier.tokens == 299
    # with room again it goes on where it was
    far.tier.arena.limit = None
    got = feed(sequence.part(299, 300))
    torch.testing.assert_close(got[:, 0, :, 0], dense(sequence)[:, :, -1])


def test_memory_that_is_not_there_is_told_before_anything_is_evicted(monkeypatch):
    monkeypatch.setattr(arena_module, "_available", lambda: 10)
    feed = Feed(Offload(**SMALL), layers=1)
    with pytest.raises(SpaceError, match="10 are free; name a folder"):
        feed(stream(100, layers=1))
    assert feed.stores[0].views()[0].k.shape[2] == 100


def test_methods_that_overlook_it_are_refused():
    sequence = stream(120, layers=1)
    policy = Offload(**SMALL)
    store = Store([((0, 1), policy)], 2)
    store.append(sequence.k[0], sequence.v[0])
    for name, works in [("quest", False), ("dense", False), ("retrieval", True), ("fetch", True)]:
        args = {"retrieval": {"budget": 4096}}.get(name, {})
        view = store.views()[0]
        q = sequence.q[0][:, :, -1:]
        call = call_for(q, view, 120, (0, 1, 2, 3), memory=store.memory_of(slice(0, 1)))
        methods = [((0, 1), build(name, args))]
        assert apply(q, view.k, view.v, call, methods, policy).isfinite().all()  # nothing is far yet
        store.asked([sequence.q[0]], now=True)
        view = store.views()[0]
        call = call_for(q, view, 120, (0, 1, 2, 3), memory=store.memory_of(slice(0, 1)))
        assert far_of(call) is not None
        if works:
            o = apply(q, view.k, view.v, call, methods, policy)
            torch.testing.assert_close(o, dense(sequence)[:, :, -1:])
        else:
            with pytest.raises(UnsupportedError, match="Offload has moved tokens"):
                apply(q, view.k, view.v, call, methods, policy)
        store.reset()
        store.append(sequence.k[0], sequence.v[0])


def test_another_text_behind_the_first_is_refused():
    store, sequence = Store([((0, 1), Offload(**SMALL))], 2), stream(100, layers=1)
    store.append(sequence.k[0], sequence.v[0])
    store.asked([sequence.q[0]], now=True)
    far = next(iter(store.memory[0].values()))
    far.tier.crop(far.tier.blocks - 1)
    store.append(sequence.k[0], sequence.v[0])
    with pytest.raises(PlanError, match="reset"):
        store.asked([sequence.q[0]], now=True)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=97)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).double().eval()


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
@pytest.mark.parametrize("decode", [None, ("retrieval", {"budget": 4096}), ("fetch", {"blocks": 4096})])
def test_generates_what_the_model_generates(model, how, decode, tmp_path):
    ids = torch.randint(0, 97, (1, 15), generator=torch.Generator().manual_seed(1)).repeat(1, 8)
    usual = dict(max_new_tokens=24, do_sample=False, pad_token_id=0, **how)
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **usual)
    policy = ("offload", {"sink": 4, "recent": 16, "block": 8, "cache": 10_000, "folder": str(tmp_path)})
    plan = Plan.uniform(model, cache=policy, **({} if decode is None else {"decode": decode}))
    with attach(model, plan) as session:
        cache = session.cache()
        got = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **usual)
        assert torch.equal(got, want)
        assert cache.state_bytes() > 10_000
        # a second question over the same cache, padded rows and all
        more = torch.cat((got, ids[:, :30]), 1)
        with torch.no_grad():
            seen = cache.get_seq_length()
            if how.get("num_beams") is None:
                logits = model(more[:, seen:], past_key_values=cache).logits
                torch.testing.assert_close(logits[:, -1], model_alone(model, session, more))


def model_alone(model, session, ids):
    session.detach()
    with torch.no_grad():
        return model(ids).logits[:, -1]


def test_rows_of_different_length(model):
    ids = torch.randint(1, 97, (3, 90), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :30], mask[1, :7] = 0, 0
    usual = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    want = model.generate(ids, attention_mask=mask, **usual)
    plan = Plan.uniform(model, cache=("offload", {"sink": 4, "recent": 9, "block": 5, "cache": 20_000}))
    with attach(model, plan) as session:
        got = model.generate(ids, attention_mask=mask, past_key_values=session.cache(), **usual)
    assert torch.equal(got, want)


def test_presets_join_it_with_methods_that_read_it():
    plan = preset("offload+retrieval", ModelShape(2, 4, 2), 8192)
    assert {(a.method, a.phase, a.heads) for a in plan.layers[0]} == {
        ("offload", "cache", None),
        ("retrieval", "decode", None),
    }


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"recent": 0}, "recent must be an int >= 1, got 0"),
        ({"sink": -1}, "sink"),
        ({"block": True}, "block"),
        ({"cache": 0}, "cache must be an int >= 1"),
        ({"limit": 0}, "limit must be bytes"),
        ({"folder": "/no/such/folder"}, "is no folder"),
    ],
)
def test_bad_arguments(args, said):
    with pytest.raises(InputError, match=said):
        Offload(**args)


def test_a_cache_smaller_than_a_block_is_told_before_anything_is_evicted():
    feed = Feed(Offload(**SMALL, cache=100), layers=1)
    with pytest.raises(InputError, match=r"cache of 100 bytes .*does not hold one block"):
        feed(stream(100, layers=1))
    assert feed.stores[0].views()[0].k.shape[2] == 100
    assert isinstance(Tier(1, 1), Tier)


def test_a_draft_in_the_prompt_may_be_taken_back_however_few_are_recent():
    draft_in_the_prompt(Offload(sink=0, recent=1, block=1, cache=100_000))


PROMPT = [
    ("minference", {"columns": 10, "diagonals": 20, "last": 8, "block": 8}),
    ("trishape", {"sink": 4, "recent": 16, "last": 16}),
    ("streaming", {"sink": 4, "recent": 16}),
    "dense",
]


@pytest.mark.parametrize("prefill", PROMPT)
@pytest.mark.parametrize("decode", [None, ("fetch", {"blocks": 4096})])
def test_a_second_question_is_read_exactly_whatever_reads_prompts(model, prefill, decode, tmp_path):
    """What the first turn's method did to the keys stays; from the second on nothing that is far is overlooked."""
    rng = torch.Generator().manual_seed(4)
    first, second = (torch.randint(0, 97, (1, n), generator=rng) for n in (150, 60))
    policy = ("offload", {"sink": 4, "recent": 16, "block": 8, "cache": 20_000, "folder": str(tmp_path)})
    with attach(model, Plan.uniform(model, prefill=prefill, decode=decode, cache=policy)) as session, torch.no_grad():
        cache = session.cache()
        model(first, past_key_values=cache)
        assert cache.state_bytes() > 10_000
        got = model(second, past_key_values=cache).logits
    # the reference: the same first turn, everything kept, and a dense second one over it
    with attach(model, Plan.uniform(model, prefill=prefill)) as session, torch.no_grad():
        whole = session.cache()
        model(first, past_key_values=whole)
        held = [(layer.store.groups[0].k, layer.store.groups[0].v) for layer in whole.layers]
    with attach(model, Plan.uniform(model)) as session, torch.no_grad():
        dense = session.cache()
        model(first, past_key_values=dense)
        for layer, (k, v) in zip(dense.layers, held, strict=True):
            layer.store.groups[0].k, layer.store.groups[0].v = k, v
        want = model(second, past_key_values=dense).logits
    torch.testing.assert_close(got, want)
    if prefill != "dense":
        # and the first turn was not dense, so that this compares what it should
        whole_text = model_logits(model, torch.cat((first, second), 1))[:, 150:]
        assert (got - whole_text).abs().max() > 1e-5


def model_logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_a_long_prompt_in_chunks_never_lies_on_the_device(model):
    """Store and block cache hold a chunk and the policy's ends, however long the prompt; and it is read exactly."""
    ids = torch.randint(0, 97, (1, 1200), generator=torch.Generator().manual_seed(6))
    policy = ("offload", {"sink": 4, "recent": 16, "block": 8, "cache": 40_000})
    most = 0
    with attach(model, Plan.uniform(model, prefill="minference", cache=policy)) as session, torch.no_grad():
        cache = session.cache(1200)
        got = []
        for a in range(0, 1200, 100):
            got.append(model(ids[:, a : a + 100], past_key_values=cache).logits)
            most = max(most, cache.bytes() + tiers_of(cache)[0].cap.held())
    chunk = 2 * (100 + 100 // 8 + 4 + 16 + DRAFT + 8 + 2 * 64) * 2 * (2 * 8 * 8 + 4)
    assert most <= 40_000 + chunk < 1200 * 2 * 2 * 2 * 8 * 8
    assert sum(tier.tokens for tier in tiers_of(cache)) > 2 * 1100
    # its second chunk on it reads densely (the budget of the first is more than a chunk)
    torch.testing.assert_close(torch.cat(got, 1), model_logits(model, ids))


def tiers_of(cache):
    return [far_of_memory(layer.store.memory[0]).tier for layer in cache.layers]


@pytest.mark.parametrize("where", ["memory", "folder", "limit"])
def test_a_lack_of_space_is_told_before_any_work(model, where, monkeypatch, tmp_path):
    """The disk and the memory are asked for what all layers together will put away."""
    # 2 layers, 2 key heads, keys and values of width 8 in float64
    need = (5000 - 4 - 16 - DRAFT) // 8 * 8 * 2 * 2 * 2 * 8 * 8
    usage = offload_module.check_space.__globals__["shutil"].disk_usage(tmp_path)
    monkeypatch.setattr(arena_module.shutil, "disk_usage", lambda folder: usage._replace(free=need - 1))
    monkeypatch.setattr(arena_module, "_available", lambda: need - 1)
    args = {"sink": 4, "recent": 16, "block": 8, "cache": 40_000}
    args |= {"memory": {}, "folder": {"folder": str(tmp_path)}, "limit": {"limit": 1_000_000}}[where]
    said = {"memory": "host memory", "folder": str(tmp_path), "limit": "limit is 1000000"}[where]
    with attach(model, Plan.uniform(model, cache=("offload", args))) as session:
        with pytest.raises(SpaceError, match=said):
            session.cache(5000)
        assert not list(tmp_path.iterdir()) and session.calls == {0: 0, 1: 0}
        session.cache()  # who names no length is told when it comes to it
        if where == "limit":
            return
        session.cache(4900)


@pytest.mark.parametrize("decode", ["dense", "streaming", ("quest", {"budget": 64}), "hip"])
def test_a_decoder_that_overlooks_it_is_not_attached(model, decode):
    for heads, taken in ((None, [0, 1, 2, 3]), ((1,), [2, 3])):
        far = Assign(heads, "offload", {"recent": 64}, "cache")
        plan = Plan.uniform(model, decode=decode).also(Plan.per_head(model, [[], [far]]))
        with pytest.raises(PlanError, match=f"in layer 1 .* heads {re.escape(str(taken))}"):
            attach(model, plan)
        assert model.config._attn_implementation == "sdpa"
    # other heads, and a method that reads what is far, are served
    some = [Assign((0, 1), *(decode if isinstance(decode, tuple) else (decode, {})), "decode")]
    attach(model, Plan.per_head(model, [[*some, far], []])).detach()
    attach(model, Plan.uniform(model, decode="fetch", cache="offload")).detach()


@pytest.mark.parametrize(
    ("args", "free", "error", "said"),
    [
        # a block of 8 tokens: key and value of width 8 in float64, and its checksum, for 2 layers
        ({"cache": 2 * (8 * 2 * 8 * 8 + 8) - 1}, None, InputError, "make cache 2064 or more"),
        ({"limit": 8 * 2 * 2 * 8 * 8 - 1}, None, SpaceError, "its limit is 2047"),
        ({"expect": 4000}, 4000 * 2 * 2 * 2 * 8 * 8 - 1, SpaceError, "2048000 bytes of host memory are needed"),
        ({"expect": 4000, "limit": 500_000}, None, SpaceError, "would put away 1024000 bytes"),
        ({"folder": "here"}, 100, SpaceError, "4096 bytes in .* 100 are free"),
    ],
)
def test_no_room_at_all_is_told_when_attached(model, args, free, error, said, monkeypatch, tmp_path):
    if free is not None:
        monkeypatch.setattr(arena_module, "_available", lambda: free)
        usage = arena_module.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(arena_module.shutil, "disk_usage", lambda folder: usage._replace(free=free))
    args = {"sink": 4, "recent": 16, "block": 8} | args | ({"folder": str(tmp_path)} if "folder" in args else {})
    with pytest.raises(error, match=said):
        attach(model, Plan.uniform(model, cache=("offload", args)))
    assert model.config._attn_implementation == "sdpa"
    # a little more of what was too little
    more = {key: value + 1 for key, value in args.items() if key in ("cache", "limit") and "expect" not in args}
    if more:
        attach(model, Plan.uniform(model, cache=("offload", args | more))).detach()


def test_a_text_that_stays_in_the_store_needs_no_room(model, monkeypatch):
    with attach(model, Plan.uniform(model, cache=("offload", {"sink": 4, "recent": 600}))) as session:
        monkeypatch.setattr(arena_module, "_available", lambda: 0)
        session.cache(500)
        with pytest.raises(SpaceError, match="host memory"):
            session.cache(1000)


def test_all_layers_share_one_budget_on_the_device(model):
    ids = torch.randint(0, 97, (1, 300), generator=torch.Generator().manual_seed(5))
    budget = 30_000
    plan = Plan.uniform(model, cache=("offload", {"sink": 4, "recent": 16, "block": 8, "cache": budget}))
    with attach(model, plan) as session, torch.no_grad():
        cache = session.cache()
        near, peak = [], 0
        for a in range(0, 300, 50):
            model(ids[:, a : a + 50], past_key_values=cache)
            tiers = [far_of_memory(layer.store.memory[0]).tier for layer in cache.layers if layer.store.memory[0]]
            near = [tier.near_bytes() for tier in tiers]
            peak = max(peak, sum(near))
        # both layers hold something, all of it is counted, and together they stay below what was given for one
        assert len(near) == 2 and min(near) > 0 and budget / 2 < peak <= budget
        assert tiers[0].cap is tiers[1].cap and tiers[0].cap.held() == sum(near)
        # two caches of two conversations are two budgets
        other = session.cache()
        model(ids, past_key_values=other)
        assert far_of_memory(other.layers[0].store.memory[0]).tier.cap is not tiers[0].cap


def far_of_memory(memory):
    return next(held for name, held in memory.items() if name.startswith("far"))


def test_room_for_what_is_expected_is_made_with_the_first(monkeypatch):
    sequence, feed = stream(400, layers=1), Feed(Offload(**SMALL, cache=1 << 20, expect=400), layers=1)
    feed(sequence.part(0, 120))
    held = feed.stores[0].memory[0]
    tier = far_of_memory(held).tier
    size = tier.far_bytes()
    assert size >= 400 // 7 * 7 * 2 * 32 * 8
    monkeypatch.setattr(arena_module, "_available", lambda: 0)
    feed(sequence.part(120, 399))
    assert tier.far_bytes() == size
    monkeypatch.setattr(arena_module, "_available", lambda: size)
    feed = Feed(Offload(**SMALL, cache=1 << 20, expect=4000), layers=1)
    with pytest.raises(SpaceError, match="name a folder"):
        feed(sequence.part(0, 120))
    assert feed.stores[0].views()[0].k.shape[2] == 120
