"""The decode bench: rows of the schema, right figures, and nothing timed when a result is wrong."""

import pytest
import torch

from saccade.core.errors import SaccadeError
from saccade.evaluate import bench_decode
from saccade.evaluate.bench_decode import decode_rows, store_rows

FIELDS = {
    *("what", "impl", "peer", "device", "dtype", "length", "density", "graph", "ms", "peer_ms", "speedup"),
    *("gb_per_s", "floor_ms"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench_decode, "CHECKED", 300)
    monkeypatch.setattr(bench_decode, "COPY", {"cpu": 1 << 20})


def test_rows():
    rows = decode_rows(512, 0.25, torch.float32, "cpu", repeats=2)
    assert {row["what"] for row in rows} >= {"full", "blocks of 64 per kv head", "blocks of 64 per query head"}
    for row in rows:
        assert set(row) == FIELDS and row["length"] == 512 and row["dtype"] == "float32"
        assert row["density"] == (1.0 if row["what"] == "full" else 0.25)
        assert row["ms"] > 0 and row["speedup"] == pytest.approx(row["peer_ms"] / row["ms"], rel=0.02, abs=0.01)
    # the floor follows from the bytes that a way reads
    floors = {row["what"]: row["floor_ms"] for row in rows}
    assert floors["blocks of 64 per kv head"] <= floors["full"] / 3


def test_rows_of_stores_that_hold_less(monkeypatch):
    monkeypatch.setattr(bench_decode, "HEADS", {"cpu": (4, 2, 16)})
    monkeypatch.setattr(bench_decode, "LAYERS", {"cpu": 1})
    rows = store_rows(340, torch.float32, "cpu", repeats=1)
    assert [row["what"] for row in rows] == ["half of the kv heads hold 320 tokens", "int8 keys and values"]
    assert rows[0]["density"] == round((340 + 320) / 680, 4)


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = bench_decode.attend

    def wrong(*args, impl="auto", **more):
        out = right(*args, impl=impl, **more)
        return out if impl == "reference" else out._replace(o=out.o * 1.1)

    monkeypatch.setattr(bench_decode, "attend", wrong)
    with pytest.raises(SaccadeError, match="nothing was timed"):
        decode_rows(512, 0.25, torch.float32, "cpu", repeats=1)
