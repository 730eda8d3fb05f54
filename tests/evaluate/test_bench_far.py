"""The bench of the far tier, small and on a CPU: every part runs, and its figures hang together."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "bench" / "far.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_far", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_part_runs(bench, monkeypatch, tmp_path, capsys):
    out = tmp_path / "far.json"
    sizes = "--length 6000 --layers 2 --steps 3 --chunk 1500 --budget 0.6 --block 16 --blocks 8 4000"
    monkeypatch.setattr(
        sys, "argv", ["far.py", "--device", "cpu", *sizes.split(), "--folder", str(tmp_path), "--json", str(out)]
    )
    bench.main()
    got = json.loads(out.read_text())
    rows = {(row["what"], row.get("move"), row.get("length")): row for row in got["rows"]}
    assert not [row for row in got["rows"] if "error" in row or "left_out" in row], got["rows"]
    # what is read: everything, or what was asked for
    most = rows["fetch, 4000 blocks, against dense", None, None]
    some = rows["fetch, 8 blocks, against dense", None, None]
    assert most["mass_kept_low"] > 0.999 and most["output_error"] < 1e-3
    assert some["mass_kept_mean"] < most["mass_kept_mean"]
    assert 0 < rows["retrieval, lists, against dense", None, None]["mass_kept_mean"] <= 1.0001
    slow, fast = (rows["fetch, 8 blocks", move, None] for move in (0.5, 6.0))
    assert 1 >= slow["hit_rate"] > fast["hit_rate"] >= 0 and fast["bus_bytes_step_layer"] > slow["bus_bytes_step_layer"]
    # dense attention moves all of it
    far = got["rows"][0]["far_tokens"]
    assert rows["dense over host memory", None, None]["bus_bytes_step_layer"] >= far * 2 * 2 * 32 * 4
    assert "tokens/s for 32 layers" in capsys.readouterr().out


def test_keys_are_what_it_says(bench):
    """Stretches share a direction, some keys are heavy for every query, a query looks for its stretches."""
    size = bench.Size(4, 2, 64)
    text = bench.Text(size, 20480, 3, "cpu", torch.float32)
    k, v = text.keys(0, 20480)
    assert k.shape == v.shape == (1, 2, 20480, 64)
    q = text.query(0.0)
    scores = (q[0, :, 0].view(2, 2, 64) @ k[0].transpose(1, 2)) / 8
    for g in range(2):
        focus = {int(t) for t in text.focus[g]}
        stretch = scores[g].mean(0).view(-1, bench.STRETCH).mean(-1)
        best = set(stretch.topk(len(focus)).indices.tolist())
        assert len(best & focus) >= len(focus) - 1
        assert scores[g][:, text.at[g]].mean() > scores[g].mean() + 3
    before = text.focus.clone()
    text.query(0.0)
    assert torch.equal(text.focus, before)
    moved = [int((text.query(6.0), text.focus != before)[1].sum()) for _ in range(3)]
    assert sum(moved) > 10
