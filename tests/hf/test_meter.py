"""Meter and doctor: the numbers they report, against numbers counted by hand."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from saccade import Plan, attach
from saccade.core.call import Call
from saccade.core.pattern import Full, Tokens, Window
from saccade.hf.doctor import doctor
from saccade.hf.meter import Meter, kept_mass
from saccade.methods.apply import Seen
from saccade.methods.policy.duo import DuoAttention

LAYERS, HEADS = 2, 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, pad_token_id=0)).eval()


def measure(model, plan, N=50, steps=0, own=True, **meter):
    ids = torch.randint(3, 64, (1, N + steps), generator=torch.Generator().manual_seed(0))
    with attach(model, plan) as session, torch.no_grad():
        session.watch = found = Meter(**meter)
        cache = session.cache() if own else DynamicCache(config=model.config)
        model(ids[:, :N], past_key_values=cache)
        for i in range(N, N + steps):
            model(ids[:, i : i + 1], past_key_values=cache)
    return found


@pytest.mark.parametrize("own", [True, False])
def test_density_is_that_of_the_pattern(model, own):
    pairs = sum(min(i + 1, 7) for i in range(50)) / sum(range(1, 51))
    streaming = ("streaming", {"sink": 2, "recent": 5})
    found = measure(model, Plan.uniform(model, prefill=streaming, decode=streaming), steps=4, own=own)
    assert found.density("prefill") == pytest.approx(pairs)
    assert found.density("decode") == pytest.approx(4 * 7 / sum(range(51, 55)))
    assert found.density("prefill", layer=1) == pytest.approx(pairs)


def test_dense_is_one_and_keeps_all_mass(model):
    found = measure(model, Plan.uniform(model), steps=2)
    assert found.density("prefill") == found.density("decode") == 1.0
    assert found.kept("prefill") == pytest.approx(1.0)


def test_layers_left_dense_count(model):
    found = measure(model, Plan.uniform(model, prefill=("streaming", {"sink": 0, "recent": 1}), skip=[0]))
    assert found.density("prefill", layer=0) == 1.0
    assert found.density("prefill") == pytest.approx((1 + 50 / sum(range(1, 51))) / 2)


def test_selection_is_counted(model):
    found = measure(model, Plan.uniform(model, prefill=("oracle", {"budget": 16, "block_q": 16, "block_k": 16})))
    assert found.density("prefill") > 1.0


def test_an_evicted_store_is_compared_with_all_tokens(model):
    policy = DuoAttention(2, 5)
    found = measure(model, Plan.uniform(model, cache=policy), N=100, steps=3)
    assert found.density("decode") == pytest.approx(3 * 7 / (101 + 102 + 103))


def test_kept_mass_by_hand():
    q = torch.tensor([[1.0]]).view(1, 1, 1, 1)
    k = torch.tensor([3.0, 1.0, 2.0]).log().view(1, 1, 3, 1)
    for pattern, want in [(Tokens(torch.tensor([[[[0, 2]]]])), 5 / 6), (Window(0, 1), 2 / 6), (Full(), 1.0)]:
        seen = Seen(Call.of(q, k, scale=1.0), q, k, k, pattern, 0.0, ())
        assert kept_mass(seen).item() == pytest.approx(want)


def test_nothing_seen():
    assert Meter().density("prefill") is None and Meter().kept("decode") is None


def test_patterns_are_kept_to_be_drawn(model):
    found = measure(model, Plan.uniform(model, cache=("duo", {"sink": 2, "recent": 5})), N=60, steps=40, keep=True)
    layer = found.layers[("decode", 1)]
    assert layer.pattern.mask(layer.seen.call).sum(-1).tolist() == [[[7]] * HEADS]
    assert found.layers[("prefill", 1)].pattern.draw(found.layers[("prefill", 1)].seen.call).shape == (HEADS, 48, 48)


def test_doctor_on_a_healthy_plan(model):
    before = model.training, model.config._attn_implementation
    found = doctor(model, Plan.uniform(model, prefill=("streaming", {"sink": 2, "recent": 9}), cache="duo"), length=80)
    assert found.problems == [] and found.served == [0, 1] and found.calls == [4, 4]
    assert found.prefill_density == pytest.approx(sum(min(i + 1, 11) for i in range(80)) / sum(range(1, 81)))
    assert found.padded_difference < 1e-5 and found.dense_difference > 1e-4
    assert found.bytes_held > 0 and found.to_dict()["length"] == 80 and "layers" in found.text()
    assert (model.training, model.config._attn_implementation) == before


def test_doctor_on_a_dense_plan(model):
    found = doctor(model, Plan.uniform(model), length=40)
    assert found.dense_difference < 1e-5 and found.prefill_density == 1.0 and found.problems == []
    assert any("decode" in line for line in found.advice)


def test_doctor_sees_padding_that_is_attended_to(model, monkeypatch):
    from saccade.cache.store import Store

    real = Store.append
    monkeypatch.setattr(Store, "append", lambda self, k, v, valid=None: real(self, k, v, None))
    assert any("padded rows differ" in problem for problem in doctor(model, Plan.uniform(model), length=40).problems)


def test_low_mass_is_a_percentile_over_all_queries_heads_and_layers(model):
    found = measure(model, Plan.uniform(model, prefill=("streaming", {"sink": 1, "recent": 4}), skip=[1]), N=90)
    values = torch.cat([layer.mass[0].flatten() for layer in found.layers.values()]).double()
    assert len(values) == LAYERS * HEADS * 64
    ordered, at = values.sort().values, 0.05 * (len(values) - 1)
    want = ordered[int(at)] + (at - int(at)) * (ordered[int(at) + 1] - ordered[int(at)])
    assert found.kept_low("prefill") == pytest.approx(float(want))
    assert found.kept_low("prefill") < found.kept("prefill") < 1
    assert Meter().kept_low("prefill") is None


def test_what_choosing_costs_is_a_part_of_density(model):
    plan = Plan.uniform(model, prefill=("oracle", {"budget": 16, "block_q": 16, "block_k": 16}), skip=[0])
    found = measure(model, plan)
    assert found.estimated("prefill") == pytest.approx(0.5)
    pairs = sum(layer.pairs for layer in found.layers.values()) / sum(layer.allowed for layer in found.layers.values())
    assert found.density("prefill") == pytest.approx(pairs + 0.5)
    assert found.estimated("decode") is None


def test_mass_against_all_keys_counts_what_is_gone_and_what_is_folded():
    # keys 3, 1, 2, 4 (as weights); the store holds the first, a folded one, and the last
    every = torch.tensor([3.0, 1.0, 2.0, 4.0]).log().view(1, 1, 4, 1)
    k = torch.tensor([3.0, 1.5, 4.0]).log().view(1, 1, 3, 1)
    q = torch.ones(1, 1, 1, 1)
    call = Call.of(q, k, scale=1.0, q_pos=torch.tensor([[3]]), k_pos=torch.tensor([[[0, 2, 3]]]))
    bias = torch.tensor([[[0.0, 0.7, 0.0]]])
    assert kept_mass(Seen(call, q, k, k, Full(), 0.0, (), bias), every).item() == pytest.approx(7 / 10)
    assert kept_mass(Seen(call, q, k, k, Window(0, 1), 0.0, (), bias), every).item() == pytest.approx(4 / 10)
