"""The benches that are meant for a GPU, at tiny sizes on a CPU: their rows, and that a wrong kernel times nothing."""

import json

import pytest
import torch

from saccade.core.errors import SaccadeError
from saccade.evaluate import bench_attend, bench_clock, bench_e2e, bench_scan
from saccade.evaluate.bench import Case
from saccade.evaluate.bench_attend import attend_rows, clustered
from saccade.evaluate.bench_clock import Ceiling, gate, median_ms
from saccade.evaluate.bench_e2e import Shape, e2e_rows
from saccade.evaluate.bench_scan import scan_rows
from saccade.methods.select.minference import column_and_offset_mass

FIELDS = ["impl", "peer", "device", "dtype", "length", "density", "ms", "peer_ms", "speedup"]
LIMITS = Ceiling(1.0, 1.0)
SMALL = dict(heads=4, kv_heads=2, width=16, block=32, limits=LIMITS)


def well_formed(rows):
    for row in rows:
        assert list(row)[:9] == FIELDS
        assert row["ms"] > 0 and row["speedup"] == pytest.approx(row["peer_ms"] / row["ms"], rel=0.01, abs=0.001)
        assert 0 < row["density"] <= 1
    json.dumps(rows, allow_nan=False)
    return rows


def test_attend_has_a_row_for_each_density_direction_and_peer():
    said = []
    rows = well_formed(
        attend_rows(
            200, [0.3, 0.6], torch.float32, "cpu", 1, impl="tiled", peers=("sdpa-flash", "sdpa-cudnn"),
            backward=True, slash=True, done=said.append, **SMALL,
        )
    )  # fmt: skip
    got = [(row["pattern"], row["direction"], row["peer"]) for row in rows]
    assert got == [
        *[("blocks", "forward", "sdpa-flash"), ("blocks", "backward", "sdpa-flash")] * 2,
        ("columns and diagonals", "forward", "sdpa-flash"),
    ]
    # a dense peer does the same at every density
    assert rows[0]["peer_ms"] == rows[2]["peer_ms"]
    assert any("cudnn" in text and "does not run here" in text for text in said)
    # 4 floating-point operations per pair and channel forwards, 10 backwards, at 1 TFLOP/s; floors are rounded
    pairs = rows[0]["density"] * 4 * 200 * 201 / 2
    assert rows[0]["floor_ms"] == pytest.approx(4 * 16 * pairs / 1e9, abs=1e-4)
    assert rows[1]["floor_ms"] == pytest.approx(10 * 16 * pairs / 1e9, abs=1e-4)


@pytest.mark.parametrize("scale", [1.01, float("nan")])
def test_a_wrong_forward_times_nothing(scale, monkeypatch):
    real = bench_attend.attend

    def off(q, k, v, pattern, call, **more):
        out = real(q, k, v, pattern, call, **more)
        # one row of one head
        out.o[0, 1, -1] *= scale
        return out

    monkeypatch.setattr(bench_attend, "attend", off)
    with pytest.raises(SaccadeError, match="nothing was timed"):
        attend_rows(200, [0.5], torch.float32, "cpu", 1, impl="tiled", peers=(), **SMALL)


def test_a_wrong_gradient_times_nothing(monkeypatch):
    real = bench_attend.attend

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, k):
            return k.clone()

        @staticmethod
        def backward(ctx, pull):
            return pull * 1.001

    case = Case(200, 0.5, 4, 2, 16, 32)
    assert bench_attend.check_gradients(case, "tiled")[0] > 0
    monkeypatch.setattr(bench_attend, "attend", lambda q, k, v, *rest, **more: real(q, Off.apply(k), v, *rest, **more))
    with pytest.raises(SaccadeError, match="gradient of k"):
        bench_attend.check_gradients(case, "tiled")


def test_clustered_inputs_have_clustered_diagonals():
    from saccade.core.call import Call

    q, k, _ = clustered(8192, 2, 1, 64, torch.float32, "cpu")
    call = Call.of(q, k)
    _, mass = column_and_offset_mass(q, k, call, 64)
    kept = mass[0].topk(1000).indices.sort(-1).values
    # a run ends where the next kept offset is further than a block away: random offsets would make hundreds
    runs = (kept.diff(dim=-1) > 64).sum(-1) + 1
    assert (runs <= 30).all() and (mass[0].gather(1, kept).sum(-1) > 0.5 * mass[0].sum(-1)).all()


def test_scan_has_a_row_for_each_decay_and_direction(monkeypatch):
    monkeypatch.setattr(bench_scan, "CHECKED", 70)
    rows = well_formed(scan_rows(70, torch.float32, "cpu", 1, impl="chunked", heads=2, width=16, limits=LIMITS))
    assert [(row["decay"], row["direction"]) for row in rows] == [
        (kind, direction) for kind in ("head", "token") for direction in ("forward", "forward+backward")
    ]
    assert rows[0]["floor_ms"] == pytest.approx(4 * 2 * 70 * 16 * 4 / 1e9, abs=1e-4)


@pytest.mark.parametrize("kind", ["head", "token"])
def test_the_triton_scan_passes_the_gate_and_a_wrong_one_does_not(kind, monkeypatch):
    pytest.importorskip("triton", reason="the kernels need Triton, which has no wheel for this platform")
    monkeypatch.setattr(bench_scan, "CHECKED", 100)
    assert bench_scan.check(kind, torch.float32, "cpu", "triton", 2, 16)[0] > 0
    real = bench_scan.scan
    # a decay that is off by a percent
    monkeypatch.setattr(bench_scan, "scan", lambda q, k, v, g, **more: real(q, k, v, g * 1.01, **more))
    with pytest.raises(SaccadeError, match="nothing was timed"):
        bench_scan.check(kind, torch.float32, "cpu", "triton", 2, 16)


def test_a_whole_model_has_rows_for_prefill_and_decode():
    said = []
    shape = Shape(layers=4, width=32, inner=64, heads=4, kv_heads=2, vocabulary=100)
    rows = well_formed(e2e_rows(300, 0.3, torch.float32, "cpu", 1, shape=shape, tokens=4, done=said.append))
    assert [(row["direction"], row.get("graph"), row["peer"].endswith("flash")) for row in rows] == [
        ("prefill", None, False),
        *[("decode", graph, peer) for peer in (False, True) for graph in (False, True)],
    ]
    assert all(row["layers"] == 4 and row["ceiling_ms"] > 0 for row in rows)
    # blocks of 128 cannot be as sparse as asked for at 300 tokens, but it is not dense
    assert 0.3 < rows[0]["density"] < 0.7


def test_a_whole_model_that_answers_otherwise_times_nothing(monkeypatch):
    shape = Shape(layers=1, width=32, inner=64, heads=4, kv_heads=2, vocabulary=100)
    model = bench_e2e.build(shape, 300, torch.float32, "cpu")
    ids = torch.randint(100, (1, 50))
    bench_e2e.check(model, ids)
    from saccade.hf import serve

    real = serve.apply
    monkeypatch.setattr(serve, "apply", lambda *args, **more: real(*args, **more) * 1.01)
    with pytest.raises(SaccadeError, match="answers otherwise"):
        bench_e2e.check(model, ids)


def test_without_attention_the_model_comes_back_as_it_was():
    shape = Shape(layers=1, width=32, inner=64, heads=4, kv_heads=2, vocabulary=100)
    model = bench_e2e.build(shape, 300, torch.float32, "cpu")
    ids = torch.randint(100, (1, 50))
    with torch.no_grad():
        want = model(ids).logits
        with bench_e2e._without_attention(model):
            bare = model(ids).logits
        assert torch.equal(model(ids).logits, want)
    # only the last token, and not the same
    assert bare.shape == (1, 1, 100) and not torch.allclose(bare[:, -1], want[:, -1], atol=1e-3)


def test_clock_and_gate():
    calls = []
    assert median_ms(lambda: calls.append(1), "cpu", repeat=5, warm=2) >= 0 and len(calls) == 7
    found = bench_clock.ceiling("cpu", torch.float32)
    assert found.tflops > 0 and found.tbytes > 0
    assert Ceiling(2.0, 4.0).floor_ms(flop=2e12, bytes=2e12) == pytest.approx(1000)
    one = torch.ones(3, dtype=torch.float64)
    assert gate("it", one + 2e-3, one + 1e-3, one) == pytest.approx((2e-3, 1e-3))
    for wrong in (one + 2.1e-3, one * float("nan")):
        with pytest.raises(SaccadeError, match="it is off"):
            gate("it", wrong, one + 1e-3, one)
