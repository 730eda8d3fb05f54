"""doctor: each of its findings, by planting what it is to find."""

import json
import os
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicCache

from saccade import Assign, Plan, attach
from saccade.core.errors import UnsupportedError
from saccade.hf import doctor as module
from saccade.hf.doctor import TILED, computed_by, doctor
from saccade.kernels.attend import attend

SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
NEAR = ("streaming", {"sink": 2, "recent": 9})
LAYERS = 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=LAYERS, pad_token_id=0)).eval()


def near(model):
    return Plan.uniform(model, prefill=NEAR, decode=NEAR)


def ids(n):
    return torch.randint(3, 64, (1, n), generator=torch.Generator().manual_seed(1))


def test_nothing_is_slow_where_all_is_sparse(model):
    found = doctor(model, near(model), length=60)
    assert found.slow == [] and found.problems == []
    assert found.ways == {"store": 4 * LAYERS + 2 * LAYERS} and found.dense == {"prefill": [], "decode": []}
    assert found.kernels == {phase: ["plain PyTorch, the CPU's own path"] for phase in ("prefill", "decode")}
    # plain data, whole
    assert json.loads(json.dumps(found.to_dict()))["threads"] == torch.get_num_threads()
    assert f"{found.threads} of {found.cpus} CPUs" in found.text()


def test_dense_layers_are_named_with_their_phase_and_why(model):
    rows = [[Assign(None, "streaming", {"sink": 2, "recent": 9}, phase)] for phase in ("prefill", "decode")]
    wide = [Assign(None, "streaming", {"sink": 2, "recent": 999}, phase) for phase in ("prefill", "decode")]
    found = doctor(model, Plan.per_head(model, [*rows, wide, []]), length=60)
    assert found.dense == {"prefill": [1, 2, 3], "decode": [0, 2, 3]}
    assert found.slow == [
        "prefill is dense in layers 1, 3: the plan names no method there",
        "prefill is dense in layers 2: streaming reads everything at 60 tokens",
        "decode is dense in layers 0, 3: the plan names no method there",
        "decode is dense in layers 2: streaming reads everything at 60 tokens",
    ]


def test_a_cache_policy_that_keeps_everything_is_named(model):
    found = doctor(model, Plan.uniform(model, prefill=NEAR, cache=("duo", {"sink": 2, "recent": 999})), length=60)
    assert found.slow == ["decode is dense in layers 0-3: duo reads everything at 60 tokens"]


def own_mask(session):
    bias = torch.zeros(1, 1, 20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), float("-inf"))
    session.model(ids(20), attention_mask=bias, use_cache=False)


@pytest.mark.parametrize(
    ("run", "way", "calls", "said"),
    [
        (lambda s: s.model.generate(ids(20), max_new_tokens=3, do_sample=False), "other cache", 3, "DynamicCache"),
        (lambda s: s.model(ids(20), past_key_values=DynamicCache(config=s.model.config)), "other cache", 1, "copies"),
        (lambda s: s.model(ids(20), use_cache=False), "no cache", 1, "without a cache"),
        (own_mask, "own mask", 1, "dense sdpa, past the plan"),
    ],
)
def test_ways_that_cost_are_found_in_a_caller_s_own_use(model, run, way, calls, said):
    found = doctor(model, near(model), length=40, run=run)
    assert found.ways[way] == calls * LAYERS and found.ways["store"] == 6 * LAYERS
    (line,) = found.slow
    assert said in line and line.startswith(f"{calls * LAYERS} calls in layers 0-3")
    assert f"{found.bytes_dense:,}" in line or way != "other cache"
    good = doctor(model, near(model), length=40, run=lambda s: s.model(ids(20), past_key_values=s.cache()))
    assert good.slow == []


def test_the_refusal_of_the_gpu_s_kernels_is_repeated_in_its_words(model, monkeypatch):
    monkeypatch.setattr(module, "on_gpu", lambda q: True)
    found = doctor(model.double(), near(model), length=40)
    model.float()
    q, k = torch.randn(1, 4, 40, 8).double(), torch.randn(1, 2, 40, 8).double()
    pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 only")
    with pytest.raises(UnsupportedError) as refused:
        attend(q, k, k, impl="triton")
    words = str(refused.value).split("this call: ")[1].split("; use 'tiled'")[0]
    assert f"prefill runs in {TILED} {words}" in found.slow
    assert found.kernels["prefill"] == [f"{TILED} {words}"] and any(
        line.startswith("decode runs") for line in found.slow
    )
    # what the kernels take is theirs
    found = doctor(model, near(model), length=40)
    assert found.kernels["prefill"] == found.kernels["decode"] == ["Triton"] and found.slow == []


def test_a_machine_without_triton(model, monkeypatch):
    monkeypatch.setattr(module, "on_gpu", lambda q: True)
    monkeypatch.setitem(sys.modules, "saccade.kernels.attend.triton", None)
    monkeypatch.delattr("saccade.kernels.attend.triton", raising=False)
    found = doctor(model, near(model), length=40)
    assert f"prefill runs in {TILED} Triton is not installed" in found.slow


def test_a_method_that_gives_the_answer_itself_is_named(model):
    seen = []
    with attach(
        model, Plan.uniform(model, prefill=("hyper", {"block": 8, "samples": 8, "exact_below": 16}))
    ) as session:
        session.watch = seen.append
        model(ids(60), past_key_values=session.cache())
    assert computed_by(seen[0]) == "HyperAttention, by itself"


@pytest.mark.parametrize(
    ("threads", "cpus", "said"), [(2, 1, "wait for each other"), (1, 8, "1 of 8 CPUs"), (1, 2, None), (2, 2, None)]
)
def test_threads(model, monkeypatch, threads, cpus, said):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cpus), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = doctor(model, near(model), length=40)
    assert (found.threads, found.cpus) == (threads, cpus)
    assert [said in line for line in found.slow] == ([True] if said else [])


def test_a_layer_that_goes_past_the_plan_is_a_problem(model, monkeypatch):
    monkeypatch.setattr(model.model.layers[2].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    found = doctor(model, near(model), length=40)
    assert any("calls per layer are [4, 4, 0, 4]" in line for line in found.problems)


def test_a_plan_that_serves_no_layer():
    config = MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=8, pad_token_id=0)
    model = MistralForCausalLM(config).eval()
    with pytest.raises(UnsupportedError, match="would serve nothing"):
        doctor(model, near(model), length=40)
    found = doctor(model, Plan.uniform(model), length=40)
    assert found.served == [] and found.left_alone == [0, 1] and found.prefill_density is None
    assert any("serves no layer" in line for line in found.problems) and "left alone" in found.text()


def test_the_model_is_left_as_it_was_where_the_caller_s_use_fails(model):
    def broken(session):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        doctor(model.train(), near(model), length=40, run=broken)
    assert model.training and model.config._attn_implementation != "saccade"
    model.eval()
