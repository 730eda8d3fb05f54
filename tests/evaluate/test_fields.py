"""The fields of a row: all there, as JSON, and nothing but what they are made of."""

import json

import pytest
import torch

from saccade.core.plan import Plan
from saccade.evaluate import fields
from saccade.evaluate.fidelity import fidelity, read_dense
from saccade.evaluate.fields import FIELDS, clock, measures
from saccade.evaluate.presets import resolve

IDS = torch.randint(3, 4096, (300,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def dense(tiny):
    return read_dense(tiny, IDS, most=4)


@pytest.mark.parametrize(
    "name", ["dense", "streaming", "minference", "quest", "quest@0.2", "snapkv", "hyper", "recycled"]
)
def test_every_field_is_there_as_json(tiny, dense, name):
    found = measures(tiny, resolve(name, tiny, 300), dense)
    assert tuple(found.row) == FIELDS
    assert json.loads(json.dumps(found.row, allow_nan=False)) == found.row
    unknown = {"peak_bytes"} | ({"mass", "mass_low", "estimate"} if name == "hyper" else set())
    assert {key for key, value in found.row.items() if value is None} == unknown
    assert isinstance(found.row["read_bytes"], int)
    assert set(found.row["waterfall"]) == {"prefill", "decode"}
    assert sum(found.row["waterfall"]["prefill"].values()) > 0
    assert (found.look is None) == (name == "dense")


def test_a_row_says_what_was_found(tiny, dense):
    plan = resolve("quest@0.2", tiny, 300)
    near, found = fidelity(tiny, plan, dense), measures(tiny, plan, dense, clocked=False)
    assert found.row["waterfall"] is None and found.row["peak_bytes"] is None
    for name in ("mass", "mass_low", "output_error", "kl_answer", "kl_other", "agree_answer", "agree_other"):
        assert found.row[name] == pytest.approx(getattr(near, name), rel=1e-4)
    assert found.row["density"] == pytest.approx(near.look.density("decode"), rel=1e-4)
    assert found.row["estimate"] == pytest.approx(near.look.estimated("decode"), rel=1e-4)
    assert 0 < found.row["estimate"] < found.row["density"]
    assert found.row["read_bytes"] == round(near.read_bytes) < dense.read_bytes
    assert found.row["ceiling"] == 1.0


def test_stock_attention_is_its_own_measure(tiny, dense):
    row = measures(tiny, None, dense, clocked=False).row
    assert row | {"read_bytes": None} == dict.fromkeys(FIELDS) | {
        **dict.fromkeys(("density", "mass", "mass_low", "agree_answer", "agree_other", "ceiling"), 1.0),
        **dict.fromkeys(("estimate", "output_error", "kl_answer", "kl_other"), 0.0),
    }
    assert row["read_bytes"] == round(dense.read_bytes)


def test_the_clock_alone_reads_once_and_is_not_watched(tiny, dense, monkeypatch):
    monkeypatch.setattr(fields, "fidelity", None)
    calls = []
    hook = tiny.model.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        found = clock(tiny, Plan.uniform(tiny.shape), dense)
    finally:
        hook.remove()
    # a warm-up of three, then a prefill and as many steps as the dense answer took
    assert len(calls) == 3 + 1 + len(dense.tokens) - 1
    assert set(found) == {"waterfall", "peak_bytes"} and found["peak_bytes"] is None


def test_what_is_not_finite_is_not_known():
    assert fields._plain({"a": float("nan"), "b": float("inf"), "c": [1][0], "d": 1 / 3}) == {
        "a": None,
        "b": None,
        "c": 1,
        "d": 0.33333,
    }
