"""Every method attached to tiny models of transformers: what users do with a model, against the method's own answer.

The methods are the contract's instances, so small that they leave things out at these lengths, in all their phases at
once. References are the same method in a simpler situation: a row alone, a request alone, one call instead of several,
a beam search written out as a loop without any reordering, a model whose shared key heads are copied.
"""

import copy
from itertools import pairwise

import pytest
import torch
import transformers as tf
from every_method import ALL, each_of, make, plan_of, tokens

from saccade import Assign, Plan, attach
from saccade.core.errors import PlanError
from saccade.core.table import METHODS, find
from saccade.evaluate.presets import preset
from saccade.methods.base import Attention, CachePolicy

HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FITTED = ("duo", "razor", "moa", "seer")  # no preset for a model that nothing was fitted for
every_method = each_of(ALL)


@pytest.fixture(scope="module")
def llama():
    return make(tf.LlamaForCausalLM, tf.LlamaConfig)


@pytest.fixture(scope="module")
def copied(llama):
    """The same model with a copy of its key heads for every query head."""
    twin = make(tf.LlamaForCausalLM, tf.LlamaConfig, num_key_value_heads=8)
    weights = dict(llama.state_dict())
    for name, t in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = t.unflatten(0, (2, 16)).repeat_interleave(4, 0).flatten(0, 1)
    twin.load_state_dict(weights)
    return twin


@pytest.fixture(scope="module")
def hybrid():
    return make(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, sliding_window=24, layer_types=HYBRID)


def feed(model, cache, ids, cuts=()):
    """Logits of all tokens, fed in pieces that end at the cuts."""
    with torch.no_grad():
        pieces = pairwise((0, *cuts, ids.shape[1]))
        return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in pieces], 1)


def generate(model, cache, ids, **more):
    with torch.no_grad():
        return model.generate(ids, past_key_values=cache, do_sample=False, return_dict_in_generate=True, **more)


def same(got, want):
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-5)


@every_method
def test_leaves_something_out(llama, name):
    """Otherwise nothing below would be said of it."""
    ids, cuts = tokens(1, 200), (190, *range(191, 200))
    with attach(llama, Plan.uniform(llama)) as session:
        dense = feed(llama, session.cache(), ids, cuts)
    with attach(llama, plan_of(name, llama)) as session:
        apart = (feed(llama, session.cache(), ids, cuts) - dense).abs().max()
    lossless = isinstance(ALL[name], CachePolicy) and ALL[name].lossless
    assert (float(apart) < 1e-7) == (name in ("dense", "fetch") or lossless), float(apart)


@every_method
def test_a_prompt_in_chunks_is_the_prompt_in_one(llama, name):
    method = ALL[name]
    if method.chunked != "exact":
        pytest.skip(f"declared: {method.chunked}")
    ids = tokens(1, 150)
    with attach(llama, plan_of(name, llama)) as session:
        whole = feed(llama, session.cache(), ids)
        # pieces of more than 16 tokens: shorter ones are decoding
        same(feed(llama, session.cache(), ids, (70, 90, 123)), whole)


@every_method
def test_a_second_question_over_the_same_cache(llama, name):
    """Asked behind the first one's answer; and of a copy of the cache, while another is asked of the original."""
    method, ids = ALL[name], tokens(1, 160, seed=1)
    first, second, other = ids[:, :110], ids[:, 113:143], tokens(1, 30, seed=2)
    talk = (110, 111, 112, 113, 143, *range(144, 160))
    with attach(llama, plan_of(name, llama)) as session:
        want = feed(llama, session.cache(), ids, talk)
        assert want.isfinite().all()
        cache = session.cache()
        feed(llama, cache, ids[:, :113], (110, 111, 112))
        twin = copy.deepcopy(cache)
        feed(llama, cache, other)
        feed(llama, cache, first)
        same(feed(llama, twin, second), want[:, 113:143])
        same(feed(llama, twin, ids[:, 143:], range(1, 17)), want[:, 143:])
        if method.chunked == "exact" and {"prefill", "cache"} & set(method.phases):
            # nothing that it does hangs on where one call ends and the next begins
            same(feed(llama, session.cache(), ids), want)


@every_method
def test_rows_of_a_left_padded_batch_are_the_rows_alone(llama, name):
    lengths, steps = (150, 110, 50), dict(max_new_tokens=5, output_logits=True)
    ids, mask = tokens(3, 150), torch.ones(3, 150, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : 150 - length], mask[row, : 150 - length] = 0, 0
    with attach(llama, plan_of(name, llama)) as session:
        got = generate(llama, session.cache(), ids, attention_mask=mask, **steps)
        for row, length in enumerate(lengths):
            alone = generate(llama, session.cache(), ids[row : row + 1, 150 - length :], **steps)
            same(torch.stack(got.logits)[:, row], torch.stack(alone.logits)[:, 0])
            assert torch.equal(got.sequences[row, 150:], alone.sequences[0, length:])


def beams_by_hand(model, session, ids, count, steps):
    """Beam search without reordering: every step reads the prompt anew, and then what each beam has said."""
    said, scores, moved = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.float64), 0
    for _ in range(steps):
        rows = torch.cat((ids.expand(len(said), -1), said), 1)
        end = ids.shape[1]
        logits = feed(model, session.cache(), rows, range(end, rows.shape[1]))[:, -1]
        total = (scores[:, None] + logits.log_softmax(-1)).flatten()
        scores, best = total.topk(count)
        beam, token = best // logits.shape[1], best % logits.shape[1]
        moved += beam.tolist() != sorted(set(beam.tolist()))
        said = torch.cat((said[beam], token[:, None]), 1)
    return said, scores, moved


@every_method
def test_beams_are_a_beam_search_without_reordering(llama, name):
    ids, steps = tokens(1, 80, seed=3), 5
    with attach(llama, plan_of(name, llama)) as session:
        said, scores, moved = beams_by_hand(llama, session, ids, 3, steps)
        common = dict(max_new_tokens=steps, length_penalty=0.0, num_beams=3, num_return_sequences=3)
        got = generate(llama, session.cache(), ids, output_scores=True, **common)
        assert torch.equal(got.sequences[:, 80:], said)
        same(got.sequences_scores.double(), scores)
        one, *_ = beams_by_hand(llama, session, ids, 1, steps)
        greedy = generate(llama, session.cache(), ids, max_new_tokens=steps)
        assert torch.equal(greedy.sequences[:, 80:], one)
        # beams that never change places would prove nothing; the first step takes all of them from one
        assert moved > 1
        if session.plan.layers[0][0].phase != "cache":
            # transformers reorders its own cache and tells nobody
            theirs = generate(llama, tf.DynamicCache(config=llama.config), ids, output_scores=True, **common)
            assert torch.equal(theirs.sequences[:, 80:], said)
            same(theirs.sequences_scores.double(), scores)


@every_method
def test_shared_key_heads_are_copies(llama, copied, name):
    if ALL[name].grouped:
        pytest.skip("declared: query heads that share a key head choose together")
    ids, cuts, found = tokens(1, 150), (140, 141, 142), []
    for model in (llama, copied):
        with attach(model, plan_of(name, model)) as session:
            found.append(feed(model, session.cache(), ids, cuts))
    same(*found)


@every_method
def test_layers_with_a_sliding_window_are_left_alone(hybrid, name):
    ids, cuts, layers = tokens(1, 150), (130, *range(131, 150)), []

    def run(cache):
        states = []
        hook = hybrid.model.layers[0].register_forward_hook(lambda module, args, out: states.append(out))
        try:
            logits = feed(hybrid, cache, ids, cuts)
        finally:
            hook.remove()
        return logits, torch.cat([s[0] if isinstance(s, tuple) else s for s in states], -2)

    if any(ALL[name].source(layer) in (0, 2) for layer in (1, 3) if isinstance(ALL[name], Attention)):
        with pytest.raises(PlanError, match="keeps its own attention"):
            attach(hybrid, plan_of(name, hybrid))
        return
    dense, states = run(tf.DynamicCache(config=hybrid.config))
    with attach(hybrid, plan_of(name, hybrid)) as session:
        assert session.served() == [1, 3]
        cache = session.cache()
        got, mine = run(cache)
        layers = [type(layer).__name__ for layer in cache.layers]
        assert session.calls[0] == session.calls[2] == 0 < session.calls[1] == session.calls[3]
    assert layers == ["DynamicSlidingWindowLayer", "StoreLayer"] * 2
    # the first layer slides: its output is what it is without a plan
    same(mine, states)
    assert got.isfinite().all() and got.shape == dense.shape


@every_method
def test_two_requests_that_take_turns_do_not_see_each_other(llama, name):
    ids = [tokens(1, 150, seed=4), tokens(1, 150, seed=5)]
    ends = (60, 130, 131, 132, 140, 150)
    with attach(llama, plan_of(name, llama)) as session:
        want = [feed(llama, session.cache(), row, ends[:-1]) for row in ids]
        caches, got = [session.cache(), session.cache()], ([], [])
        for a, b in pairwise((0, *ends)):
            for at in (0, 1):
                got[at].append(feed(llama, caches[at], ids[at][:, a:b]))
        for parts, alone in zip(got, want, strict=True):
            same(torch.cat(parts, 1), alone)


PRESETS = [name for name in METHODS if name not in FITTED and "layer" not in find(name).phases]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_attach_and_generate(llama, name):
    """With the budgets of a longer text: all of them dense at this length, or nearly; nothing breaks."""
    ids = tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    with attach(llama, preset(name, llama, 8192)) as session:
        out = generate(llama, session.cache(100), ids, attention_mask=mask, max_new_tokens=3, output_logits=True)
    assert out.sequences.shape == (2, 93) and torch.stack(out.logits).isfinite().all()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in PRESETS])
def test_what_has_no_preset_says_what_is_needed(llama, name):
    with pytest.raises(PlanError, match=f"{name}: .*(saccade.fit.{name}|layer with its own weights)"):
        preset(name, llama, 8192)


def test_a_choice_that_no_layer_makes_is_refused_when_attached(llama):
    picks = {"budget": 24, "first": 1, "correct": 3}
    above = {"inner": {"method": "tidal", "args": picks}, "length": 50}
    for method, args in (("tidal", picks), ("above", above)):
        row = [Assign(None, method, args, "decode")]
        attach(llama, Plan.per_head(llama, [row] * 4)).detach()
        with pytest.raises(PlanError, match="layer 2 reads what layer 1 picks, but layer 1 has it not"):
            attach(llama, Plan.per_head(llama, [row, [], row, row]))
        some = [Assign((0, 1), method, args, "decode")]
        with pytest.raises(PlanError, match="for the same heads"):
            attach(llama, Plan.per_head(llama, [row, some, row, row]))


@pytest.mark.parametrize("policy", ["duo", "razor", "snapkv"])
@pytest.mark.parametrize("name", [name for name, method in ALL.items() if isinstance(method, Attention)])
def test_beside_a_policy_a_method_works_or_is_refused_when_attached(llama, name, policy):
    """No prompt is read in vain: what could not decode over what the policy leaves is not attached at all."""
    method, ids = ALL[name], tokens(1, 120)
    plan = Plan.uniform(llama, **{phase: method for phase in method.phases}, cache=ALL[policy])
    if "decode" in method.phases and (method.whole_store or method.unbroken):
        with pytest.raises(PlanError, match=f"^{type(method).__name__} needs every token"):
            attach(llama, plan)
        assert llama.config._attn_implementation == "sdpa"
        return
    with attach(llama, plan) as session:
        cache = session.cache(120)
        assert feed(llama, cache, ids, (110, 111, 112)).isfinite().all()
        held = [group.lengths[0] for layer in cache.layers for group in layer.store.groups]
        assert max(held) < 120


def tensors(held):
    """All tensors that a memory holds, in whatever."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, (dict, list, tuple)):
        for item in held.values() if isinstance(held, dict) else held:
            yield from tensors(item)
    elif hasattr(held, "__dict__"):
        yield from tensors(vars(held))


@every_method
def test_what_is_remembered_holds_no_more_than_it_says(llama, name):
    """A slice of a prompt's queries, kept, keeps all of them."""
    with attach(llama, plan_of(name, llama)) as session:
        cache = session.cache(400)
        for more in (tokens(1, 400), tokens(1, 3)):
            feed(llama, cache, more, range(1, 3) if more.shape[1] == 3 else ())
            for layer in cache.layers:
                for held in tensors(layer.store.memory):
                    mine, whole = held.numel() * held.element_size(), held.untyped_storage().nbytes()
                    # room to grow, and two halves of one computation, are no prompt
                    assert whole <= 2 * mine + 4096, (held.shape, whole)
