"""The bench of selection: what it reports, and that a wrong selection is never timed."""

import math

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, SaccadeError
from saccade.core.pattern import Blocks
from saccade.evaluate import bench_select
from saccade.evaluate.bench_select import clustered, plain_mass, plain_pooled, plain_vertical_slash, select_rows
from saccade.kernels.select.vertical_slash import column_and_offset_mass
from saccade.kernels.topk import top_pooled
from saccade.methods.select.minference import MInference

SMALL = {"dtype": torch.float32, "device": "cpu", "repeats": 1, "heads": 4, "kv_heads": 2, "width": 8}


def test_rows():
    rows = select_rows(1000, 0.3, **SMALL)
    assert [row["impl"] for row in rows] == ["pooled-64", "pooled-128", "vertical-slash"]
    for row in rows:
        assert (row["peer"], row["device"], row["dtype"], row["length"]) == ("torch", "cpu", "float32", 1000)
        assert row["dense"] == "sdpa" and row["ms"] > 0 and row["peer_ms"] > 0
        assert math.isclose(row["speedup"], row["peer_ms"] / row["ms"], rel_tol=0.05, abs_tol=2e-3)
        assert math.isclose(row["share_of_dense"], row["ms"] / row["dense_ms"], rel_tol=0.05, abs_tol=2e-3)
    assert abs(rows[0]["density"] - 0.3) < 0.1  # early rows are dense, and blocks are whole


def test_the_peers_choose_the_same():
    q, k = clustered(704, 4, 2, 16, torch.float64, "cpu")
    call = Call.of(q, k)
    for one, other in zip(plain_mass(q, k, 64), column_and_offset_mass(q, k, call, 64), strict=True):
        torch.testing.assert_close(one, other)
    ours = top_pooled(q, k, 3, 64, 64, call).index
    assert torch.equal(plain_pooled(q, k, 3, 64), torch.where(ours < 0, 11, ours).long())
    columns, index = plain_vertical_slash(q, k)
    pattern = MInference(bench_select.COLUMNS, bench_select.DIAGONALS).select(q, k, call)
    assert torch.equal(columns.sort(-1).values, pattern.parts[1].index[:, :, 0].long())
    for one, other in zip(index[0, 0].tolist(), pattern.parts[0].index[0, 0].tolist(), strict=True):
        assert {j for j in one if 0 <= j < 11} == {j for j in other if j >= 0}


def test_inputs_stand_out_in_runs_of_offsets():
    q, k = clustered(8192, 2, 1, 64, torch.float32, "cpu")
    _, offset = column_and_offset_mass(q, k, Call.of(q, k), 64)
    best = offset.topk(200).indices.sort(-1).values
    # neighbours, not scattered: 200 lone offsets would lie in about 100 of the 128 blocks
    assert max(len(set((row // 64).tolist())) for row in best[0]) <= 40
    assert (offset.topk(200).values.sum(-1) / 64 > 0.5).all()


def test_wrong_blocks_are_not_timed(monkeypatch):
    def worst(q, k, count, block_q, block_k, call):
        index = top_pooled(-q, k, count, block_q, block_k, call).index
        return Blocks(index, block_q, block_k)

    monkeypatch.setattr(bench_select, "top_pooled", worst)
    with pytest.raises(SaccadeError, match="top_pooled"):
        select_rows(512, 0.2, **SMALL)


@pytest.mark.parametrize("name", ["pool", "column_and_offset_mass", "largest", "diagonal_blocks"])
def test_wrong_steps_are_not_timed(monkeypatch, name):
    real = getattr(bench_select, name)

    def wrong(*args):
        out = real(*args)
        if isinstance(out, Blocks):
            return Blocks((out.index - 1).clamp_min(-1), 64, 64)
        return tuple(t * 1.01 for t in out) if isinstance(out, tuple) else out + 1

    monkeypatch.setattr(bench_select, name, wrong)
    with pytest.raises(SaccadeError, match=name):
        select_rows(512, 0.2, **SMALL)


@pytest.mark.parametrize("change", [{"density": 0.0}, {"density": 1.5}, {"heads": 3}])
def test_refuses(change):
    args = {"length": 100, "density": 0.5, **SMALL, **change}
    with pytest.raises(InputError, match="bench"):
        select_rows(**args)
