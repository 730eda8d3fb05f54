"""The bench of decoding, at a tiny size on a CPU: its rows, what it counts, and the caches that it fills."""

import json

import pytest
import torch

from saccade.core.errors import PlanError, SaccadeError
from saccade.evaluate import bench_tokens
from saccade.evaluate.bench_e2e import Shape, build
from saccade.evaluate.bench_tokens import FILL, decode_plan, filled, made_up, token_rows
from saccade.hf import serve
from saccade.hf.attach import attach

SHAPE = Shape(layers=4, width=64, inner=64, heads=4, kv_heads=2, vocabulary=100)
LENGTH = 1500


@pytest.fixture(scope="module")
def rows():
    torch.set_num_threads(1)
    said = []
    methods = ["dense", "duo", "quest@0.1", "hip@0.3"]
    found = token_rows(LENGTH, methods, torch.float32, "cpu", shape=SHAPE, tokens=8, done=said.append)
    assert any("transformers-sdpa-flash" in text for text in said)
    return found


def test_four_rows_for_each_method(rows):
    json.dumps(rows, allow_nan=False)
    got = [(row["method"], row["peer"], row["graph"]) for row in rows]
    peers = ("transformers-sdpa", "transformers-sdpa-flash")
    methods = ("dense", "duo", "quest@0.1", "hip@0.3")
    assert got == [(name, peer, graph) for name in methods for peer in peers for graph in (False, True)]
    for row in rows:
        assert row["cache"] == FILL and row["direction"] == "decode" and row["layers"] == 4
        assert row["speedup"] == pytest.approx(row["peer_ms"] / row["ms"], rel=0.01, abs=0.001)
        assert row["ms"] > 0 and row["ceiling_ms"] > 0
    # a peer is timed once
    assert len({row["peer_ms"] for row in rows}) == 2


def test_what_is_read_is_counted(rows):
    mine = {row["method"]: row for row in rows}
    # the third token after the text: keys and values of 2 heads of width 16 in 4 layers, float32
    dense = 4 * 2 * (LENGTH + 3) * 2 * 16 * 4
    assert mine["dense"]["read_bytes"] == dense and mine["dense"]["state_bytes"] == 0
    assert mine["dense"]["density"] == pytest.approx(1.0, abs=0.01)
    # every second head reads its window only
    window = bench_tokens.SINK + bench_tokens.RECENT
    assert mine["duo"]["read_bytes"] == pytest.approx(dense / 2 * (1 + window / LENGTH), rel=0.03)
    assert mine["quest@0.1"]["read_bytes"] < 0.5 * dense and mine["quest@0.1"]["state_bytes"] > 0
    assert 0.05 < mine["quest@0.1"]["density"] < 0.4


def test_steps_of_several_kinds_are_weighed_by_how_often_they_come(rows):
    hip = next(row for row in rows if row["method"] == "hip@0.3" and row["graph"])
    often = sorted(kind["steps"] for kind in hip["kinds"])
    # a search at every eighth of 32 positions, and perhaps at the first
    assert sum(often) == 32 and often[0] in (4, 5)
    mean = sum(kind["ms"] * kind["steps"] for kind in hip["kinds"]) / 32
    assert hip["ms"] == pytest.approx(mean, rel=0.01)
    assert all(len(row["kinds"]) == 1 for row in rows if row["graph"] and row["method"] != "hip@0.3")


def test_a_cache_is_filled_as_a_prompt_would_fill_it():
    model = build(SHAPE, 600, torch.float32, "cpu")
    text = list(made_up(SHAPE, 600, torch.float32, "cpu"))
    with attach(model, decode_plan("duo", model, 600)) as session:
        cache = filled(session, text)
        assert cache.get_seq_length() == 600
        k, v, pos = cache.materialize(2, 1)
        assert torch.equal(k, text[2][0][0, 1]) and torch.equal(v, text[2][1][0, 1]) and len(pos) == 600
        # streaming heads hold sinks and recent tokens only
        k, _, pos = cache.materialize(2, 0)
        assert len(pos) < 420 and torch.equal(k, text[2][0][0, 0][pos.long()])


def test_only_what_decodes_is_planned():
    model = build(SHAPE, 600, torch.float32, "cpu")
    assert {a.phase for row in decode_plan("hip", model, 4096).layers for a in row} == {"decode"}
    with pytest.raises(PlanError):
        decode_plan("razor", model, 4096)


def test_a_model_that_answers_otherwise_times_nothing(monkeypatch):
    real = serve.apply
    monkeypatch.setattr(serve, "apply", lambda *args, **more: real(*args, **more) * 1.01)
    with pytest.raises(SaccadeError, match="answers otherwise"):
        token_rows(600, ["dense"], torch.float32, "cpu", shape=SHAPE, tokens=4)
