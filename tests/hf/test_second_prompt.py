"""A second long prompt over a cache that evicts, and a prompt in pieces, beside every prefill method.

Each key head of a model of four layers has another policy. Every attention call after the first is compared with a
loop: softmax of its queries over what `materialize` says was stored before it, and over the call's own tokens.
"""

import json
from argparse import Namespace
from itertools import pairwise

import pytest
import torch
import transformers as tf
from every_method import ALL, TINY, each_of, make, tokens

from saccade import Assign, Plan, attach
from saccade.cli.plan import run as show
from saccade.core.call import Call
from saccade.core.errors import UnsupportedError
from saccade.core.pattern import Full, Window
from saccade.core.plan import _named
from saccade.hf import serve
from saccade.hf.doctor import doctor
from saccade.kernels.attend import attend
from saccade.methods import apply as applied
from saccade.methods.base import Attention, Method
from saccade.methods.policy.duo import DuoAttention
from saccade.methods.policy.razor import RazorAttention

LAYERS, HEADS, SHARE = TINY["num_hidden_layers"], TINY["num_attention_heads"], 4
CUTS = (90, 140, 141, 142, 182, 183, 200)  # a prompt in two pieces, 2 tokens, a second prompt, a token, a third prompt
DUO, MOA = {"sink": 2, "recent": 20}, {"span": 30, "sink": 4, "least": 16, "block": 16}
WINDOWS = {"duo": (2, 20), "moa": (4, 28)}  # what a query sees of what these keep
KEPT = [  # of each layer's two key heads
    [None, ("duo", DUO)],
    [("snapkv", {"capacity": 40, "window": 8, "kernel": 3, "slack": 4}), ("moa", MOA)],
    [("razor", {"sink": 2, "least": 20, "slack": 4}), ("h2o", {"heavy": 14, "recent": 10})],
    [
        ("razor", {"sink": 2, "least": 20, "slack": 4, "compensate": False}),
        ("offload", {"sink": 4, "recent": 20, "block": 8}),
    ],
]
PREFILL = [name for name, m in ALL.items() if isinstance(m, Attention) and "prefill" in m.phases]
ABLE = {"dense", "streaming", "streaming-no_sink"}


@pytest.fixture(scope="module")
def llama():
    return make(tf.LlamaForCausalLM, tf.LlamaConfig)


def plan_with(model, method, kept=KEPT, decode=True):
    rows = []
    for layer in range(LAYERS):
        row = [Assign((g,), *policy, "cache") for g, policy in enumerate(kept[layer]) if policy]
        rows.append([Assign(None, *_named(method), "prefill"), *row])
        if layer == 0 and decode and "decode" in method.phases:
            # heads that keep everything may have it in decoding, too; some methods then ask for that
            rows[-1].append(Assign(tuple(range(SHARE)), *_named(method), "decode"))
    return Plan.per_head(model, rows)


def watched(session, monkeypatch):
    """Every call that comes to the session: layer, queries, new keys and values, the answer."""
    calls, attend = [], session.attend

    def note(layer, q, k, v, mask, scale):
        out = attend(layer, q, k, v, mask, scale)
        calls.append((layer, q, k, v, out))
        return out

    monkeypatch.setattr(session, "attend", note)
    return calls


def reference(q, keys, values, pos, first, bias, window):
    """One query after the other: q [N,D], keys [M,D] at positions pos [M], the first query at `first`."""
    outs = []
    for n, row in enumerate(q.double()):
        here = first + n
        seen = pos <= here
        if window is not None:
            seen &= (pos < window[0]) | (pos > here - window[1])
        weight = torch.exp(keys[seen] @ row / row.shape[0] ** 0.5 + bias[seen])
        outs.append(weight @ values[seen] / weight.sum())
    return torch.stack(outs)


def window_of(name, policy, prompt):
    """What a query sees: a method that can read what is kept serves prompts itself."""
    if prompt and name == "dense":
        return None
    if prompt and name.startswith("streaming"):
        return ALL[name].sink, ALL[name].recent
    return WINDOWS.get(policy)


def check(model, name, monkeypatch, cuts=CUTS):
    """Feed a text in pieces; compare every call but the first; give the session's counters."""
    ids, text = tokens(1, cuts[-1]), {layer: [] for layer in range(LAYERS)}
    with attach(model, plan_with(model, ALL[name])) as session, torch.no_grad():
        calls, cache = watched(session, monkeypatch), session.cache(cuts[-1])
        for a, b in pairwise((0, *cuts)):
            # after a call of few tokens policies wait for the next one
            for layer in cache.layers:
                layer.store.settle()
            held = (
                [[[t.clone() for t in cache.materialize(at, g)] for g in (0, 1)] for at in range(LAYERS)] if a else None
            )
            calls.clear()
            model(ids[:, a:b], past_key_values=cache)
            assert [call[0] for call in calls] == list(range(LAYERS))
            for layer, q, k, v, out in calls:
                text[layer].append((k, v))
                for g, policy in enumerate(KEPT[layer]):
                    if not a or policy is None:
                        continue
                    compare(name, policy, held[layer][g], text[layer], g, a, q, k, v, out)
        return dict(session.ways)


def compare(name, policy, held, text, g, a, q, k, v, out):
    keys, values, pos = held
    kind = policy[0]
    if kind == "offload":
        # nothing is lost
        keys, values = (torch.cat([piece[at][0, g] for piece in text[:-1]]) for at in (0, 1))
        pos = torch.arange(a)
    else:
        assert len(pos) < min(a, 60) and int(pos[-1]) == a - 1, "nothing was evicted"
    bias = torch.zeros(len(pos) + k.shape[2], dtype=torch.float64)
    if kind == "razor" and policy[1].get("compensate", True):
        bias[2] = torch.tensor(a - (len(pos) - 1.0)).log()
    keys, values = torch.cat((keys, k[0, g])), torch.cat((values, v[0, g]))
    pos = torch.cat((pos.long(), torch.arange(a, a + k.shape[2])))
    window = window_of(name, kind, prompt=k.shape[2] > 16 and kind != "offload")
    for h in range(g * SHARE, (g + 1) * SHARE):
        want = reference(q[0, h], keys, values, pos, a, bias, window)
        torch.testing.assert_close(
            out[0, h], want, atol=1e-6, rtol=1e-5, msg=lambda m: f"{name}, {policy}, at {a}: {m}"
        )


@each_of(PREFILL)
def test_every_method_beside_every_policy_is_exact_over_what_is_stored(llama, name, monkeypatch):
    ways = check(llama, name, monkeypatch)
    # three later prompts; where a method reads what is kept, offloaded tokens alone are left to their policy
    later = {layer: ways.get(("later prompt dense", layer), 0) for layer in range(LAYERS)}
    assert later == dict.fromkeys(range(LAYERS), 3) if name not in ABLE else {0: 0, 1: 0, 2: 0, 3: 3}


def test_what_a_method_declares_is_what_it_does():
    assert {name for name in PREFILL if not ALL[name].unbroken} == ABLE
    q, k = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 120, 16)
    k_pos = torch.cat((torch.arange(80), torch.arange(160, 200)))[None, None]
    for name in PREFILL:
        call = Call.of(q, k, q_pos=torch.arange(160, 200)[None], k_pos=k_pos)
        if name in ABLE:
            assert ALL[name].attend(q, k, k, call).o.isfinite().all()
        else:
            with pytest.raises(UnsupportedError, match="a store without holes"):
                ALL[name].attend(q, k, k, call)


@each_of(PREFILL)
def test_heads_that_lost_nothing_are_read_by_their_method(llama, name, monkeypatch):
    """The first layer's first key head keeps everything: the same whatever is evicted beside it."""
    outs, ids = [], tokens(1, CUTS[-1])
    for recent in (20, 999):
        kept = [[None, ("duo", {"sink": 2, "recent": recent})], *KEPT[1:]]
        with attach(llama, plan_with(llama, ALL[name], kept)) as session, torch.no_grad():
            calls, cache = watched(session, monkeypatch), session.cache()
            for a, b in pairwise((0, *CUTS)):
                llama(ids[:, a:b], past_key_values=cache)
            outs.append(torch.cat([out[0, :SHARE] for layer, *_, out in calls if layer == 0], 1))
    torch.testing.assert_close(*outs, atol=1e-7, rtol=1e-6)


@each_of(PREFILL)
def test_a_second_prompt_before_anything_was_dropped(llama, name, monkeypatch):
    """Tokens were decoded in between, which a method in prefill has not seen: one needs them, and its policy serves."""
    keep = ("snapkv", {"capacity": 200, "window": 8})
    with attach(llama, plan_with(llama, ALL[name], [[keep, keep]] * LAYERS, decode=False)) as session, torch.no_grad():
        calls, cache = watched(session, monkeypatch), session.cache()
        for a, b in ((0, 90), (90, 91), (91, 140)):
            assert llama(tokens(1, 140)[:, a:b], past_key_values=cache).logits.isfinite().all()
        dense = {layer for way, layer in session.ways if way == "later prompt dense"}
        assert dense == (set(range(LAYERS)) if name == "longheads" else set())
    if name == "longheads":
        _, q, _, _, out = calls[-LAYERS]
        keys, values, pos = cache.materialize(0, 1)
        want = reference(q[0, 5], keys, values, pos, 91, torch.zeros(len(pos)), None)
        torch.testing.assert_close(out[0, 5], want, atol=1e-7, rtol=1e-6)


RAGGED = [("minference", KEPT[1][0]), ("hyper", KEPT[2][0]), ("pooled", KEPT[3][1])]


@pytest.mark.parametrize(("name", "policy"), RAGGED)
def test_rows_of_a_ragged_batch_are_the_rows_alone(llama, name, policy):
    """One row has lost tokens, one has not yet, one brings a few tokens of a second prompt only."""
    first, second = (110, 24, 90), (40, 24, 10)
    ids = [tokens(1, a + b, seed) for seed, (a, b) in enumerate(zip(first, second, strict=True))]
    mask = torch.zeros(3, 150, dtype=torch.long)
    text = torch.zeros(3, 150, dtype=torch.long)
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        text[row, 110 - a : 110], text[row, 150 - b :] = ids[row][0, :a], ids[row][0, a:]
        mask[row, 110 - a : 110] = mask[row, 150 - b :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with attach(llama, plan_with(llama, ALL[name], [[policy, policy]] * LAYERS)) as session, torch.no_grad():
        cache = session.cache(150)
        for part in (slice(0, 110), slice(110, 150)):
            more = dict(attention_mask=mask[:, : part.stop], position_ids=positions[:, part])
            got = llama(text[:, part], past_key_values=cache, **more).logits
        for row, (a, b) in enumerate(zip(first, second, strict=True)):
            alone = session.cache(150)
            for part in (slice(0, a), slice(a, a + b)):
                want = llama(ids[row][:, part], past_key_values=alone).logits
            torch.testing.assert_close(got[row, 40 - b :], want[0], atol=1e-7, rtol=1e-5)


def test_folded_tokens_are_weighed_by_the_policy_where_a_method_cannot():
    class Itself(Attention):
        phases, reads = ("prefill", "decode"), 0

        def attend(self, q, k, v, call):
            self.reads += 1
            return attend(q, k, v, Full(), call)

    q, k, method = torch.randn(1, 2, 20, 8), torch.randn(1, 1, 25, 8), Itself()
    call = Call.of(
        q, k, q_pos=torch.arange(80, 100)[None], k_pos=torch.cat((torch.arange(5), torch.arange(80, 100)))[None, None]
    )
    bias = torch.zeros(1, 1, 25)
    bias[..., 2] = 4.0
    out = applied.apply(q, k, k, call, [(None, method)], RazorAttention(), bias=bias)
    torch.testing.assert_close(out, attend(q, k, k, Full(), call, key_bias=bias).o)
    assert method.reads == 0
    with pytest.raises(UnsupportedError, match="cannot weigh the folded tokens"):
        applied.apply(
            q[:, :, -1:],
            k,
            k,
            Call.of(q[:, :, -1:], k, q_pos=torch.tensor([[99]]), k_pos=call.k_pos),
            [(None, method)],
            RazorAttention(),
            bias=bias,
        )
    applied.apply(q, k, k, call, [(None, method)])
    assert method.reads == 1


def test_doctor_and_the_plan_s_map_say_where_later_prompts_are_dense(llama, tmp_path):
    plan = plan_with(llama, ALL["minference"])
    found = doctor(llama, plan, length=90)
    # the policies of each key head: two with razor's name
    assert {(e["policy"], tuple(e["layers"])): e["heads"] for e in found.later} == {
        ("duo", (0,)): [[4, 5, 6, 7]],
        ("snapkv", (1,)): [[0, 1, 2, 3]],
        ("moa", (1,)): [[4, 5, 6, 7]],
        ("razor", (2, 3)): [[0, 1, 2, 3]] * 2,
        ("h2o", (2,)): [[4, 5, 6, 7]],
        ("offload", (3,)): [[4, 5, 6, 7]],
    }
    assert all(e["seen"] == e["layers"] and e["method"] == "minference" for e in found.later)
    line = "dense in heads 0-3 of layers 2-3, over what razor keeps: minference cannot read that"
    assert f"later prompts     {line} (so it was in layers 2-3)" in found.text()
    assert found.ways["later prompt dense"] == LAYERS and found.problems == []
    assert json.loads(json.dumps(found.to_dict()))["later"] == found.later
    # too short to lose anything
    short = doctor(llama, plan, length=24)
    assert [e["seen"] for e in short.later] == [[]] * 6 and "(nothing was dropped in the probe)" in short.text()
    # where the method reads on, only offloaded tokens are left to their policy
    able = doctor(llama, plan_with(llama, ALL["streaming"]), length=90)
    assert [(e["policy"], e["seen"]) for e in able.later] == [("offload", [3])]
    assert doctor(llama, Plan.uniform(llama, prefill=ALL["minference"]), length=40).later == []
    plan.save(tmp_path / "plan.json")
    shown = show(Namespace(file=str(tmp_path / "plan.json"), out=None))
    assert f"later prompts are {line}" in shown.text and shown.data["later_prompts"][3] == line


def as_if_whole(q, view, seen, heads, **fields):
    return Call.of(q, view.k, heads=heads, **fields)


def without_bias(q, k, v, pattern, call, key_bias=None, lse=True):
    return attend(q, k, v, pattern, call, lse=lse)


FAULTS = [
    ("minference", applied, "reads", lambda *given: True, UnsupportedError),
    ("minference", serve, "call_for", as_if_whole, AssertionError),
    ("minference", applied, "attend", without_bias, AssertionError),
    ("minference", DuoAttention, "pattern", lambda self, call: Full(), AssertionError),
    ("hip", DuoAttention, "pattern", lambda self, call: Window(2, 19), AssertionError),
    ("dense", Method, "unbroken", True, AssertionError),
]


@pytest.mark.parametrize(("name", "where", "what", "fault", "error"), FAULTS)
def test_planted_faults_are_found(llama, monkeypatch, name, where, what, fault, error):
    """Without them `check` passes: the tests above."""
    monkeypatch.setattr(where, what, fault)
    with pytest.raises(error):
        check(llama, name, monkeypatch)
