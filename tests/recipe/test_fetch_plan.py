"""The reader's plan for fetching is what its recipe says, stands for both its names, reads and answers as it may."""

import pytest
import torch

from saccade.cache.store import Store, call_for
from saccade.core.plan import Plan
from saccade.evaluate.costs import read_bytes
from saccade.evaluate.fidelity import fidelity, read_dense
from saccade.evaluate.model import READER, load
from saccade.evaluate.presets import PLANS, preset, resolve
from saccade.evaluate.tasks.needle import Needle
from saccade.methods.apply import Roles, apply
from saccade.recipe.fetch import NAME, fetch


def test_the_shipped_plan_is_the_recipe():
    plan = fetch()
    assert Plan.load(PLANS / NAME) == plan
    steps = [[(a.method, a.phase) for a in row] for row in plan.layers]
    assert steps == [*[[("fetch", "decode"), ("offload", "cache")]] * 7, [("offload", "cache")]]


def test_it_stands_for_both_names_and_for_no_other():
    plan = fetch()

    def row(name, layer=0, bundled=True):
        return preset(name, plan.model, 8192, bundled=bundled).layers[layer]

    for name in ("fetch+offload", "offload+fetch", " fetch + offload "):
        found = preset(name, plan.model, 8192, bundled=True)
        assert found.layers == plan.layers and found.note == name
    for name in ("minference+fetch+offload", "offload+minference+fetch"):
        assert {a.phase: a.method for a in row(name, 7)} == {"prefill": "minference", "cache": "offload"}
        assert [a for a in row(name) if a.phase != "prefill"] == list(plan.layers[0])
    # one name alone, a share, and another model go by the presets
    for name in ("fetch", "offload", "retrieval+offload", "fetch@0.1+offload"):
        assert not [a for a in row(name) if a in plan.layers[0]]
    assert [a.method for a in row("fetch+offload", 7, bundled=False)] == ["fetch", "offload"]


@pytest.mark.parametrize("length", [16384, 32768])
def test_a_step_reads_less_than_a_fifth(length):
    share = []
    for layer in (3, 7):
        roles = Roles.of(fetch(), layer, length)
        ((_, policy),) = roles.cache
        store = Store([((0, 1), policy)], 2)
        q, k, v = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
        store.append(k, v)
        store.asked([q], now=True)
        view, seen = store.views()[0], []
        call = call_for(q[:, :, -1:], view, length, (0, 1, 2, 3), memory=store.memory_of(slice(0, 1)))
        apply(q[:, :, -1:], view.k, view.v, call, roles.decode, policy, watch=seen.append)
        share.append(read_bytes(seen[0]) / (2 * length * 16 * 4))
    before, last = share
    assert last == 1.0 and (7 * before + last) / 8 < 0.195


def test_it_answers_a_needle_as_dense_attention_does():
    loaded = load(READER, "float32", "cpu")
    sample = Needle().sample(loaded.tokenizer, 4096, 0, seed=5)
    plan = resolve("fetch+offload", loaded, 4096)
    dense = read_dense(loaded, sample.ids, others=1)
    near = fidelity(loaded, plan, dense)
    assert near.agree_answer == 1.0 and near.kl_answer < 1e-5
    # the answer hangs on the last layer: with blocks by chance it is the same, but layers come out otherwise (0.17)
    assert near.output_error < 0.14
    assert near.read_bytes < 0.35 * dense.read_bytes
    assert Needle().score(loaded.tokenizer.decode(dense.tokens[: dense.answered]), sample) == 1.0
