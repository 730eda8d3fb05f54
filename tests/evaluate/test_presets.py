import json

import pytest
import torch

from saccade import attach
from saccade.core.call import Call
from saccade.core.errors import FileError, PlanError
from saccade.core.pattern import Full
from saccade.core.plan import Assign, ModelShape, Plan
from saccade.core.table import METHODS, family, find
from saccade.evaluate import presets
from saccade.evaluate.model import READER, Loaded, load
from saccade.evaluate.presets import note, phases, preset, read_plan, resolve
from saccade.methods.base import Selector

SHAPE = ModelShape(8, 4, 2)
PLANNED = [name for name in METHODS if "layer" not in find(name).phases and name not in ("duo", "razor", "moa", "seer")]


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("shape", [SHAPE, ModelShape(1, 2, 1), ModelShape(32, 32, 8)])
def test_every_method_stands_in_every_phase_it_serves(name, shape):
    plan = preset(name, shape, 4096)
    assert phases(plan) == set(find(name).phases)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("length", [8192, 32768])
@pytest.mark.parametrize("name", [n for n in PLANNED if n != "dense" and "prefill" in find(n).phases])
def test_reads_a_tenth_to_a_fifth(name, length):
    method = preset(name, ModelShape(1, 1, 1), length).phase(0, "prefill")[0].build(length)
    if name == "oracle" and length > 8192:
        pytest.skip("it forms all scores, which takes too long here")
    q, k = torch.randn(2, 1, 1, length, 4).unbind(0)
    call = Call.of(q, k)
    # what gives the answer itself says what it costs
    answers = not isinstance(method, Selector)
    share = method.estimate(call) / Full().pairs(call) if answers else method.select(q, k, call).density(call)
    assert 0.02 < share < 0.2


def test_layers_and_unfitted_methods_are_refused_with_the_way_out():
    with pytest.raises(PlanError, match="own weights"):
        preset("lightning", SHAPE, 4096)
    with pytest.raises(PlanError, match=r"saccade\.fit\.duo"):
        preset("duo", SHAPE, 4096)
    with pytest.raises(PlanError, match=r"saccade\.fit\.seer"):
        preset("seer", SHAPE, 4096)
    with pytest.raises(PlanError, match="did you mean 'minference'"):
        preset("streaming+minferense", SHAPE, 4096)


def test_heads_of_a_policy_follow_it_beside_other_methods(monkeypatch, tmp_path):
    rows = [[Assign((1,), "duo", {}, "cache")], *([[]] * 7)]
    Plan.per_head(SHAPE, rows).save(tmp_path / "duo.json")
    monkeypatch.setattr(presets, "PLANS", tmp_path)
    plan = preset("streaming+duo", SHAPE, 4096, bundled=True)
    assert [(a.method, a.heads, a.phase) for a in plan.layers[0]] == [
        ("streaming", (0, 1), "prefill"),
        ("streaming", (0, 1), "decode"),
        ("duo", (1,), "cache"),
    ]
    assert [a.heads for a in plan.layers[1]] == [None, None]


@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
@pytest.mark.parametrize("name", [n for n in PLANNED if "prefill" in find(n).phases])
def test_a_policy_that_reads_a_prompt_whole_leaves_prefill_to_the_method(name, policy):
    for joined in (f"{name}+{policy}", f"{policy}+{name}"):
        row = preset(joined, SHAPE, 4096).layers[5]
        assert {(a.method, a.heads, a.phase) for a in row} == {(name, None, "prefill"), (policy, None, "cache")}


def served(plan, name):
    """(layer, query head) pairs whose prompts a method reads."""
    every = range(plan.model.heads)
    rows = [plan.phase(layer, "prefill") for layer in range(plan.model.layers)]
    return {(at, h) for at, row in enumerate(rows) for a in row if a.method == name for h in a.heads or every}


def held(plan, name):
    """(layer, query head) pairs whose key heads follow a policy."""
    every, share = range(plan.model.kv_heads), plan.model.heads // plan.model.kv_heads
    rows = [plan.phase(layer, "cache") for layer in range(plan.model.layers)]
    keys = [(at, g) for at, row in enumerate(rows) for a in row if a.method == name for g in a.heads or every]
    return {(at, g * share + i) for at, g in keys for i in range(share)}


@pytest.mark.slow
def test_every_prefill_method_beside_every_policy_attaches_and_reads():
    reader = load(READER, device="cpu")
    policies = [name for name in METHODS if family(name) == "policy" and name != "offload"]
    # moa names all heads, and each has a window of its own
    first = {"duo": "some", "moa": "none", "razor": "all", "snapkv": "all", "h2o": "all"}
    assert set(policies) == set(first)
    ids = torch.randint(3, 500, (1, 512), generator=torch.Generator().manual_seed(0))
    for name in [n for n in METHODS if "prefill" in find(n).phases]:
        alone = served(preset(name, reader.model, 512, bundled=True), name)
        assert alone
        for policy in policies:
            plan = preset(f"{name}+{policy}", reader.model, 512, bundled=True)
            left = served(plan, name)
            assert left == {"none": set(), "some": alone - held(plan, policy), "all": alone}[first[policy]]
            assert (left < alone) == (first[policy] != "all")
            if policy == "moa" and name != "dense":
                continue  # the same plan for all
            with attach(reader.model, plan) as session, torch.no_grad():
                assert reader.model(ids, past_key_values=session.cache(512)).logits.isfinite().all()


def test_a_shipped_plan_is_for_the_reader_alone(monkeypatch, tmp_path):
    Plan.uniform(SHAPE, prefill=("streaming", {"sink": 7, "recent": 9})).save(tmp_path / "streaming.json")
    monkeypatch.setattr(presets, "PLANS", tmp_path)
    assert preset("streaming", SHAPE, 4096, bundled=True).layers[0][0].args == {"sink": 7, "recent": 9}
    assert preset("streaming", SHAPE, 4096).layers[0][0].args["sink"] == 64


def test_what_is_left_dense_is_said():
    assert note(preset("minference", SHAPE, 4096)) == "decode dense"
    assert note(preset("tidal", SHAPE, 4096)) == "prefill dense"
    assert note(preset("streaming", SHAPE, 4096)) == ""
    assert note(None) == "stock transformers"
    # a policy that reads a prompt whole and evicts behind it leaves the prefill dense, one that shows a window does not
    assert note(preset("h2o", SHAPE, 4096)) == note(preset("fetch+offload", SHAPE, 4096)) == "prefill dense"
    assert note(Plan.uniform(SHAPE, cache="duo")) == note(preset("minference+h2o", SHAPE, 4096)) == ""
    assert note(preset("offload", SHAPE, 4096)) == "prefill dense, decode dense"


def test_resolve_reads_files_and_names(tiny, tmp_path):
    assert resolve("dense", tiny, 512) is None
    plan = preset("streaming", tiny.model, 512)
    plan.save(tmp_path / "a.json")
    assert resolve(str(tmp_path / "a.json"), tiny, 512) == plan
    preset("streaming", SHAPE, 512).save(tmp_path / "other.json")
    with pytest.raises(PlanError, match="8 layers"):
        resolve(str(tmp_path / "other.json"), Loaded("tiny", tiny.model, None), 512)
    with pytest.raises(FileError, match="no such file"):
        resolve(str(tmp_path / "none.json"), tiny, 512)


def test_published_files_are_known_by_their_content(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps([{"0": ["stream_llm", 10, 20, 0.5], "1": ["block_sparse", 5, 0, 0.1]}]))
    assert [a.method for a in read_plan(str(tmp_path / "m.json")).layers[0]] == ["streaming", "pooled"]
    (tmp_path / "d.tsv").write_text("0.1\t0.9\n0.8\t0.2\n")
    assert [row[0].heads for row in read_plan(str(tmp_path / "d.tsv")).layers] == [(0,), (1,)]
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(PlanError, match="line 1"):
        read_plan(str(tmp_path / "x.txt"))
