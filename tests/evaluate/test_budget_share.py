"""NAME@SHARE: what is really read at each share, by masks and measured runs; and what is refused."""

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import PlanError
from saccade.core.plan import Assign, ModelShape, Plan
from saccade.core.table import METHODS, find
from saccade.evaluate import presets
from saccade.evaluate.budget import KNOBS, keys_of, scaled
from saccade.evaluate.presets import NEEDS, phases, preset, resolve

SHARES = (0.05, 0.1, 0.2)
SHAPE = ModelShape(8, 1, 1)
LAYER = 5  # sparse in every method


def read(name, share, phase, length):
    """The share of dense that a method's pattern really holds on random keys."""
    method = preset(f"{name}@{share}", SHAPE, length).phase(LAYER, phase)[0].build(length)
    q, k = torch.randn(2, 1, 1, length, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    q = q if phase == "prefill" else q[:, :, -1:]
    # a method may choose in one layer for those behind it
    step = {}
    for layer in range(LAYER + 1) if phase == "decode" else (LAYER,):
        call = Call.of(q, k, layer=layer, step=step)
        pattern = method.select(q, k, call)
    return float(pattern.mask(call).sum() / (call.shape.N * call.offset + call.shape.N * (call.shape.N + 1) / 2))


MAIN = [("minference", "prefill"), ("pooled", "prefill"), ("quest", "decode"), ("tidal", "decode")]
MAIN += [(name, phase) for name in ("streaming", "oracle", "random", "hip") for phase in ("prefill", "decode")]


@pytest.mark.parametrize("name, phase", MAIN)
def test_reads_about_its_share_and_more_for_more(name, phase):
    # in any case minference reads the nearest 100 offsets, in blocks: of a shorter prompt that is more than the share
    length = 8192 if name == "minference" else 5000
    found = [read(name, share, phase, length) for share in SHARES]
    assert found == sorted(found) and len(set(found)) == len(found)
    for share, density in zip(SHARES, found, strict=True):
        assert share / 2 <= density <= share * 2


@pytest.mark.parametrize("length", [1024, 40000])
@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("name", [n for n in KNOBS if n != "seer"])
def test_every_budget_makes_a_method(name, share, length):
    beside = NEEDS.get(name)
    given = f"{name}@{share}" if beside is None else f"{name}@{share}+{beside}"
    plan = preset(given, SHAPE, length)
    assert phases(plan) == set(find(name).phases) | ({"cache"} if beside else set())
    for row in plan.layers:
        for assign in row:
            assign.build(length)
    assert plan.note == given
    assert Plan.from_json(plan.to_json()) == plan


def test_keys_of_a_prefill_solve_the_quadratic():
    for share in (0.01, 0.25, 1.0):
        keys = keys_of("prefill", share, 5000)
        pairs = sum(min(i + 1, keys) for i in range(5000)) / (5000 * 5001 / 2)
        assert pairs == pytest.approx(share, abs=5e-4)
        assert keys_of("decode", share, 5000) == share * 5000


@pytest.mark.parametrize(
    "name", ["quest@0", "quest@1.01", "quest@-0.1", "quest@nan", "quest@", "quest@ten", "quest@0.1@0.2"]
)
def test_a_share_that_is_none_is_refused(name):
    with pytest.raises(PlanError, match=r"share of dense.* in \(0, 1\]"):
        preset(name, SHAPE, 4096)


@pytest.mark.parametrize("name", ["dense", "offload"])
def test_a_method_without_a_budget_is_refused(name):
    with pytest.raises(PlanError, match=f"{name}: has no budget"):
        preset(f"{name}@0.1", SHAPE, 4096)


def test_unknown_and_unfitted_methods_are_refused_as_without_a_share():
    with pytest.raises(PlanError, match="did you mean 'quest'"):
        preset("qest@0.1", SHAPE, 4096)
    with pytest.raises(PlanError, match=r"saccade\.fit\.duo"):
        preset("duo@0.1", SHAPE, 4096)
    with pytest.raises(PlanError, match="own weights"):
        preset("lightning@0.1", SHAPE, 4096)


def test_every_planned_method_is_decided():
    known = {n for n in METHODS if "layer" not in find(n).phases}
    assert set(KNOBS) < known
    assert known - set(KNOBS) >= {"dense", "offload", "duo", "razor"}


def test_parts_have_their_own_shares():
    plan = preset("trishape@0.1+tidal@0.05", SHAPE, 8000)
    prefill, decode = plan.layers[0]
    assert (prefill.method, decode.method, decode.args["budget"]) == ("trishape", "tidal", 400)
    assert preset("trishape+tidal@0.05", SHAPE, 8000).layers[0][0] == preset("trishape", SHAPE, 8000).layers[0][0]


def test_a_shipped_plan_keeps_which_head_does_what(monkeypatch, tmp_path):
    rows = [
        [
            Assign((0,), "streaming", {"sink": 1, "recent": 9}, "prefill"),
            Assign((1,), "minference", {"last": 32}, "prefill"),
        ]
    ]
    Plan.per_head(ModelShape(1, 2, 1), rows).save(tmp_path / "minference.json")
    monkeypatch.setattr(presets, "PLANS", tmp_path)
    found = preset("minference@0.1", ModelShape(1, 2, 1), 8000, bundled=True).layers[0]
    assert [(a.heads, a.method) for a in found] == [((0,), "streaming"), ((1,), "minference")]
    assert found[0].args["recent"] > 300 and found[1].args["last"] == 32


def test_a_plan_is_left_as_it_was():
    plan = preset("quest", SHAPE, 4096)
    before = plan.to_json()
    scaled(plan, 0.5, 4096)
    assert plan.to_json() == before


def test_measured_density_grows_with_the_share(tiny):
    from saccade.evaluate.fidelity import fidelity, read_dense

    ids = torch.randint(3, 4096, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    dense = read_dense(tiny, ids, most=8)
    for name in ("streaming", "quest"):
        found = [fidelity(tiny, resolve(f"{name}@{share}", tiny, 900), dense) for share in SHARES]
        density = [one.look.density(one.phase) for one in found]
        error = [one.output_error for one in found]
        assert density == sorted(density) and error == sorted(error, reverse=True)


@pytest.mark.parametrize("name", ["fetch@0.1", "minference+fetch@0.1", "fetch@0.1+snapkv"])
def test_a_share_that_means_nothing_is_refused(name):
    with pytest.raises(PlanError, match=r"name fetch@0\.1\+offload"):
        preset(name, SHAPE, 4096)
    preset("offload+fetch@0.1", SHAPE, 4096)
    preset("fetch", SHAPE, 4096)
