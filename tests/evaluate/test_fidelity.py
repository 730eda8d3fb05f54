"""Distances from dense attention against stock transformers with a mask, loops in float64 and hand-made calls."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Full, Tokens
from saccade.core.plan import Assign, Plan
from saccade.evaluate.fidelity import divergence, fidelity, follow, read_dense, sparse_phase
from saccade.evaluate.generate import serving
from saccade.evaluate.look import Look, dense_rows
from saccade.evaluate.model import Loaded
from saccade.evaluate.presets import preset
from saccade.methods.apply import Seen

IDS = torch.randint(3, 4096, (300,), generator=torch.Generator().manual_seed(0)).tolist()
WINDOW = ("streaming", {"sink": 3, "recent": 20})


@pytest.fixture(scope="module")
def dense(tiny):
    return read_dense(tiny, IDS, most=10, stop="")


@pytest.fixture(scope="module")
def shallow(tiny):
    """One layer, whose queries and keys no method can change."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, head_dim=8)
    config = LlamaConfig(vocab_size=4096, num_key_value_heads=2, eos_token_id=1, attn_implementation="sdpa", **sizes)
    model = LlamaForCausalLM(config).eval()
    # queries large enough that attention is far from even
    model.model.layers[0].self_attn.q_proj.weight.data *= 40
    # and logits far apart, so that KL one way is not KL the other way
    model.model.layers[0].self_attn.o_proj.weight.data *= 100
    model.lm_head.weight.data *= 40
    return Loaded("shallow", model, tiny.tokenizer)


def whole(loaded, ids, mask=None):
    """Logits of every position from one pass of stock transformers without a cache."""
    loaded.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            more = {} if mask is None else {"attention_mask": torch.where(mask, 0.0, -math.inf)[None, None]}
            return loaded.model(torch.tensor([ids]), use_cache=False, **more).logits[0]
    finally:
        loaded.model.set_attn_implementation("sdpa")


def test_dense_answer_is_greedy_and_its_logits_are_those_of_one_pass(tiny, dense):
    assert len(dense.tokens) == dense.answered == 10 and len(dense.others) == 64
    assert list(dense.others) == sorted(set(dense.others)) and max(dense.others) < len(IDS) - 1
    logits = whole(tiny, [*IDS, *dense.tokens])
    at = [*range(len(IDS) - 1, len(IDS) + 9), *dense.others]
    torch.testing.assert_close(dense.logits, logits[at], atol=1e-4, rtol=1e-4)
    assert list(dense.tokens) == logits[len(IDS) - 1 : -1].argmax(-1).tolist()


def test_dense_reads_keys_and_values_of_all_layers(dense):
    # 9 steps, the first of which reads 301 tokens: 4 layers, 2 key heads of width 8, 4 bytes
    assert dense.read_bytes == sum(2 * 4 * 2 * 8 * 4 * (301 + i) for i in range(9)) / 9
    assert dense.widths == (8, 8)


def test_an_answer_ends_at_the_stop_and_goes_on_to_be_watched(tiny, dense):
    text = tiny.tokenizer.decode(dense.tokens[:2])
    short = read_dense(tiny, IDS, most=10, stop=text[-1])
    assert short.answered <= 2 and len(short.tokens) == 8
    assert short.tokens == dense.tokens[:8] and len(short.logits) == short.answered + 64
    assert read_dense(tiny, IDS, most=0).answered == 1
    assert len(read_dense(tiny, IDS, most=1, least=1).tokens) == 1
    with pytest.raises(InputError, match="two tokens"):
        read_dense(tiny, [5])


def test_divergence_by_a_loop():
    p, q = torch.randn(2, 5, 17, dtype=torch.double).mul(4).unbind(0)
    p[0, 3] = -math.inf
    for row, found in enumerate(divergence(p, q).tolist()):
        a, b = (np.exp(x[row].numpy()) / np.exp(x[row].numpy()).sum() for x in (p, q))
        assert found == pytest.approx(sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0))
    assert divergence(p, p).abs().max() == 0


def test_a_dense_plan_is_dense(tiny, dense):
    found = fidelity(tiny, Plan.uniform(tiny.model), dense)
    assert found.output_error < 1e-5 and found.kl_answer < 1e-8 and found.kl_other < 1e-8
    assert found.mass == pytest.approx(1) and found.mass_low == pytest.approx(1)
    assert found.agree_answer == found.agree_other == 1 and found.read_bytes == dense.read_bytes
    stock = fidelity(tiny, None, dense)
    assert (stock.output_error, stock.kl_other, stock.agree_answer, stock.read_bytes) == (0, 0, 1, dense.read_bytes)


@pytest.mark.parametrize("name", ["tiny", "shallow"])
def test_logits_are_those_of_stock_transformers_under_the_same_mask(request, name):
    loaded = request.getfixturevalue(name)
    dense = read_dense(loaded, IDS, most=10, stop="", least=10)
    found = fidelity(loaded, Plan.uniform(loaded.model, prefill=WINDOW, decode=WINDOW), dense)
    text = [*IDS, *dense.tokens]
    i, j = torch.arange(len(text))[:, None], torch.arange(len(text))[None]
    logits = whole(loaded, text, (j <= i) & ((i - j < 20) | (j < 3))).double()
    ref = whole(loaded, text).double()
    kl = (ref.softmax(-1) * (ref.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    same = (ref.argmax(-1) == logits.argmax(-1)).double()
    answer, others = slice(len(IDS) - 1, len(IDS) - 1 + dense.answered), list(dense.others)
    assert found.kl_answer == pytest.approx(float(kl[answer].mean()), rel=1e-3)
    assert found.kl_other == pytest.approx(float(kl[others].mean()), rel=1e-3)
    assert found.agree_answer == pytest.approx(float(same[answer].mean()))
    assert found.agree_other == pytest.approx(float(same[others].mean()))
    assert found.kl_answer > 1e-6 and found.phase == "prefill"
    if name == "shallow":
        back = (logits.softmax(-1) * (logits.log_softmax(-1) - ref.log_softmax(-1))).sum(-1)
        assert found.kl_other > 0.1 and abs(float(back[others].mean()) / found.kl_other - 1) > 0.01


def test_a_method_for_decoding_leaves_the_prompt_as_it_was(tiny, dense):
    found = fidelity(tiny, Plan.uniform(tiny.model, decode=WINDOW), dense)
    assert found.phase == "decode" and found.kl_other < 1e-8 and found.agree_other == 1
    assert found.kl_answer > 1e-6 and found.output_error > 0.01 and found.mass < 0.9


def attention(q, k, v, at, pairs=None):
    """One query at one position in float64, by hand: output, and the mass on the slots in `pairs`."""
    scores = (k[: at + 1].double() @ q.double()) / math.sqrt(len(q))
    weights = torch.exp(scores - scores.max())
    weights = weights / weights.sum()
    return weights @ v[: at + 1].double(), None if pairs is None else float(weights[pairs].sum())


def test_output_error_and_mass_by_a_loop(shallow):
    ids = IDS[:100]
    dense = read_dense(shallow, ids, most=3, stop="", least=3)
    seen = []
    plan = Plan.uniform(shallow.model, prefill=WINDOW, decode=WINDOW)
    look = Look()

    def watch(one):
        seen.append(one)
        look(one)

    follow(shallow, plan, dense, watch)
    for phase, calls in (("prefill", seen[:1]), ("decode", seen[1:])):
        errors, masses = [], []
        for head in range(4):
            difference = norm = 0.0
            for one in calls:
                N, M = one.call.shape.N, one.call.shape.M
                for row in range(N):
                    at = M - N + row
                    read = [j for j in range(at + 1) if j < 3 or at - j < 20]
                    o, mass = attention(one.q[0, head, row], one.k[0, head // 2], one.v[0, head // 2], at, read)
                    difference += float((one.o[0, head, row].double() - o).square().sum())
                    norm += float(o.square().sum())
                    masses += [mass] if row >= N - 64 else []
            errors.append(math.sqrt(difference / norm))
        assert look.error(phase) == pytest.approx(np.mean(errors), rel=1e-4)
        for head, error in enumerate(errors):
            assert look.error(phase, 0, head) == pytest.approx(error, rel=1e-4)
        assert look.kept(phase) == pytest.approx(np.mean(masses), rel=1e-4)
        assert look.kept_low(phase) == pytest.approx(np.percentile(masses, 5), rel=1e-4)
        assert look.kept_low(phase) < look.kept(phase) < 0.95


@pytest.mark.parametrize("heads", [None, (1,)])
@pytest.mark.parametrize("policy", [("snapkv", {"capacity": 60, "slack": 1}), ("duo", {"sink": 2, "recent": 30})])
def test_what_a_policy_dropped_is_lost(shallow, policy, heads):
    dense = read_dense(shallow, IDS, most=6, stop="", least=6)
    cache = DynamicCache(config=shallow.model.config)
    with torch.inference_mode():
        shallow.model(torch.tensor([[*IDS, *dense.tokens[:-1]]]), past_key_values=cache)
    keys, values = cache.layers[0].keys[0], cache.layers[0].values[0]
    plan = Plan(shallow.shape, ((Assign(heads, *policy, "cache"),),))
    look = Look(evicts=True)
    masses, sums = {h: [] for h in range(4)}, {h: [0.0, 0.0] for h in range(4)}

    def watch(one):
        look(one)
        if one.call.shape.N > 1:
            return
        # what is stored now will be moved by the next step
        pos, share = one.call.positions()[1][0], len(one.call.heads) // one.k.shape[1]
        read = one.pattern.mask(one.call)[0, :, 0]
        for i, head in enumerate(one.call.heads):
            at = len(IDS) + len(masses[head])
            slots = pos[min(i // share, len(pos) - 1)][read[i]].long()
            want, mass = attention(one.q[0, i, 0], keys[head // 2], values[head // 2], at, slots)
            masses[head].append(mass)
            sums[head][0] += float((one.o[0, i, 0].double() - want).square().sum())
            sums[head][1] += float(want.square().sum())

    follow(shallow, plan, dense, watch)
    assert [len(m) for m in masses.values()] == [5] * 4
    every = [m for head in masses.values() for m in head]
    assert look.kept("decode") == pytest.approx(np.mean(every), rel=1e-3)
    assert look.kept_low("decode") == pytest.approx(np.percentile(every, 5), rel=1e-3, abs=1e-6)
    for head, (difference, norm) in sums.items():
        assert look.error("decode", 0, head) == pytest.approx(math.sqrt(difference / norm), rel=1e-3, abs=1e-6)
    assert min(every) < 0.9
    if heads is not None:
        assert look.error("decode", 0, 0) < 1e-5 and min(masses[0] + masses[1]) > 0.9999


def test_long_prefills_compare_the_last_rows_and_others():
    q, k, v = torch.randn(3, 1, 2, 500, 4).unbind(0)
    call = Call.of(q, k)
    o = dense_rows(q, k, v, *call.positions(), 0.5)
    torch.testing.assert_close(
        o, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5), atol=1e-5, rtol=1e-4
    )
    wrong = []
    for row in range(500):
        bad = o.clone()
        bad[0, 1, row] += 1
        look = Look(mass=False)
        look(Seen(call, q, k, v, Full(), 0.0, (), None, bad))
        assert look.error("prefill", 0, 0) < 1e-6
        if look.error("prefill", 0, 1) > 1e-3:
            wrong.append(row)
    assert len(wrong) == 128 and wrong[-64:] == list(range(436, 500)) and wrong[0] < 60


def test_methods_that_answer_themselves_have_an_error_and_no_mass(tiny, dense):
    plan = Plan.uniform(tiny.model, prefill=("hyper", {"block": 16, "samples": 16, "exact_below": 32}))
    found = fidelity(tiny, plan, dense)
    assert found.mass is None and found.mass_low is None and found.output_error > 0.01
    assert found.look.estimated("prefill") is None and 0 < found.look.density("prefill") < 1
    assert found.read_bytes == dense.read_bytes


def test_phase_is_where_something_is_left_out(tiny, dense):
    plans = [
        (preset(n, tiny.model, 300), p) for n, p in (("pooled", "prefill"), ("quest", "decode"), ("h2o", "decode"))
    ]
    plans.append((Plan.uniform(tiny.model, cache=("duo", {"sink": 2, "recent": 30})), "prefill"))
    for plan, phase in plans:
        look = Look(evicts=True)
        follow(tiny, plan, dense, look)
        assert sparse_phase(plan, look) == phase


def test_a_look_is_for_one_sequence_from_its_start(tiny):
    with serving(tiny, preset("snapkv", tiny.model, 300)) as cache, torch.inference_mode():
        held = cache(300)
        tiny.model(torch.tensor([IDS]), past_key_values=held)
    late = serving(tiny, preset("snapkv", tiny.model, 300), Look(evicts=True))
    with late, torch.inference_mode(), pytest.raises(InputError, match="first token"):
        tiny.model(torch.tensor([[5]]), past_key_values=held)
    with pytest.raises(InputError, match="batch of 2"):
        q = torch.zeros(2, 1, 3, 4)
        Look()(Seen(Call.of(q, q), q, q, q, Full(), 0.0, (), None, q))


def test_bytes_are_unknown_where_a_method_does_not_say():
    look, q = Look(), torch.zeros(1, 1, 1, 4)
    k = torch.zeros(1, 1, 9, 4)
    assert look.step_bytes() is None and look.error("decode") is None
    look(Seen(Call.of(q, k), q, k, k, None, math.nan, (), None, q))
    assert look.step_bytes() is None and look.error("decode") == 0.0
    other = Look()
    other(Seen(Call.of(q, k), q, k, k, Tokens(torch.tensor([[[[1, 5]]]])), 3.0, (), None, q))
    assert other.step_bytes() == 2 * 8 * 4 + 3 * 4 * 4
