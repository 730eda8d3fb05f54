"""Forks of a cache: each goes on as if the other did not exist, whatever methods and policies remember."""

import copy

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from saccade import Plan, attach
from saccade.core.errors import UnsupportedError
from saccade.core.table import find

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=97,
    max_position_embeddings=1024,
    pad_token_id=0,
)
# every method that keeps anything from call to call, at budgets so small that what it remembers decides
SMALL = {
    "quest": {"budget": 48, "block_k": 8, "first": 0},
    "tidal": {"budget": 40, "first": 1, "correct": 2},
    "recycled": {"budget": 40, "stride": 3, "kernel": 3},
    "hip": {"budget": 64, "sink": 8, "first": 0, "window": 16, "block_q": 16, "block_k": 4},
    "longheads": {"keys": 64, "chunk": 16},
    "actqkv": {"budget": 96, "window": 16, "block_k": 8, "sink": 8, "near": 16},
    "streaming": {"sink": 2, "recent": 9},
}
POLICIES = {
    "snapkv": {"capacity": 40, "kernel": 3, "window": 8},
    "h2o": {"heavy": 20, "recent": 20},
    "duo": {"sink": 2, "recent": 20},
    "offload": {"sink": 8, "recent": 24, "block": 8},
    "retrieval+offload": {},
}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2)).eval()


def plan_of(model, name):
    if name == "retrieval+offload":
        far = {"sink": 8, "recent": 24, "block": 8}
        index = {"kind": "graph", "budget": 40, "sink": 8, "near": 8, "refresh": 40, "wait": True}
        return Plan.uniform(model, decode=("retrieval", index), cache=("offload", far))
    if name in POLICIES:
        return Plan.uniform(model, cache=(name, POLICIES[name]))
    phases = [phase for phase in ("prefill", "decode") if phase in find(name).phases]
    return Plan.uniform(model, **{phase: (name, SMALL[name]) for phase in phases})


def ids(n, seed, rows=1):
    return torch.randint(3, 97, (rows, n), generator=torch.Generator().manual_seed(seed))


def go_on(model, tokens, cache):
    """Logits of tokens that come in a piece, then one by one."""
    with torch.no_grad():
        parts = [tokens[:, :20], *tokens[:, 20:].split(1, 1)]
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@pytest.mark.parametrize("name", [*SMALL, *POLICIES])
@pytest.mark.parametrize("rows", [1, 2])
def test_forks_go_on_by_themselves(llama, name, rows):
    text, one, other = ids(150, 1, rows), ids(28, 2, rows), ids(28, 3, rows)
    mask = torch.ones(rows, 150, dtype=torch.long)
    if rows > 1:
        # a ragged batch has a memory for each row
        mask[0, :30] = 0

    def read(session):
        cache = session.cache(150)
        with torch.no_grad():
            llama(text, attention_mask=mask, past_key_values=cache)
            # a few steps, so that there is something to remember
            for token in ids(3, 4, rows).split(1, 1):
                llama(token, past_key_values=cache)
        return cache

    with attach(llama, plan_of(llama, name)) as session:
        want = [go_on(llama, more, read(session)) for more in (one, other)]
        cache = read(session)
        held = cache.bytes(), cache.state_bytes()
        first = cache.fork()
        found = [go_on(llama, one, first)]
        second = copy.deepcopy(cache)
        # forks share a tier, whose room grows with what any of them puts there
        assert cache.bytes() == held[0] and ("offload" in name or cache.state_bytes() == held[1])
        found.append(go_on(llama, other, cache))
        again = go_on(llama, one, second)
    assert not torch.allclose(want[0], want[1])
    pairs = [(found[0], want[0]), (found[1], want[1]), (again, want[0])]
    if "offload" in name:
        # forks share the tier's room on the device, so that its blocks come in other pieces
        for got, wanted in pairs:
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    else:
        # the same arithmetic in the same order: not a bit of difference
        assert all(torch.equal(got, wanted) for got, wanted in pairs)


def test_layers_that_are_not_served_are_copied_too():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 2
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=kinds)).eval()
    with attach(model, Plan.uniform(model, cache=("duo", {"sink": 2, "recent": 9}))) as session, torch.no_grad():
        want = model(ids(60, 1), past_key_values=session.cache()).logits[:, 40:]
        cache = session.cache()
        model(ids(60, 1)[:, :40], past_key_values=cache)
        fork = cache.fork()
        go_on(model, ids(30, 2), fork)
        assert fork.get_seq_length() == 70 and cache.get_seq_length() == 40
        torch.testing.assert_close(model(ids(60, 1)[:, 40:], past_key_values=cache).logits, want, atol=1e-5, rtol=1e-4)


def test_an_empty_cache_can_be_forked_and_one_in_fixed_steps_cannot(llama):
    with attach(llama, Plan.uniform(llama)) as session, torch.no_grad():
        empty = session.cache()
        llama(ids(10, 1), past_key_values=empty.fork())
        assert empty.get_seq_length() == 0 and empty.bytes() == 0
        cache = session.cache()
        llama(ids(10, 1), past_key_values=cache)
        with session.steps(cache, room=2), pytest.raises(UnsupportedError, match="fork"):
            cache.fork()
        assert cache.fork().get_seq_length() == 10
