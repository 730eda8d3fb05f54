"""What is true of Offload: nothing is lost, the store's bytes fall, and no method overlooks what is far."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saccade import Plan, attach
from saccade.cache import arena as arena_module
from saccade.cache.far import far_of
from saccade.cache.store import DRAFT, Store, call_for
from saccade.cache.tier import Tier
from saccade.core.errors import InputError, PlanError, SpaceError, UnsupportedError
from saccade.core.plan import ModelShape
from saccade.core.table import build
from saccade.evaluate.presets import preset
from saccade.methods.apply import apply
from saccade.methods.policy.offload import Offload
from saccade.testing.checks import draft_in_the_prompt
from saccade.testing.inputs import Feed, run, stream

SMALL = dict(sink=3, recent=11, block=7)


def dense(sequence):
    q, k, v = (t.squeeze(1) for t in sequence[:3])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("cache", [7 * 32 * 8, 7 * 32 * 8 * 5, 1 << 20])
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
    with pytest.raises(InputError, match="100 bytes does not hold one block"):
        feed(stream(100, layers=1))
    assert feed.stores[0].views()[0].k.shape[2] == 100
    assert isinstance(Tier(1, 1), Tier)


def test_a_draft_in_the_prompt_may_be_taken_back_however_few_are_recent():
    draft_in_the_prompt(Offload(sink=0, recent=1, block=1, cache=100_000))
