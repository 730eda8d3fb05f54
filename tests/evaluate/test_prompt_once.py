"""The bench that computes a prompt's attention once: the rows that `saccade eval` gives, and less work."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from saccade.evaluate.run import Ask, run
from saccade.evaluate.samples import read

FILE = Path(__file__).parents[2] / "bench" / "prompt_once.py"
TIMES = ("ttft_s", "tpot_s", "waterfall", "peak_bytes")


@pytest.fixture(scope="module")
def once():
    spec = importlib.util.spec_from_file_location("prompt_once", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_same_rows_from_less_work(once, tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(once, "load", lambda *_: tiny)
    threads = torch.get_num_threads()
    plain = torch.nn.functional.scaled_dot_product_attention
    methods, tasks = ("dense", "quest", "snapkv"), ("kv", "multi-turn")
    asked = f"--methods {','.join(methods)} --tasks {','.join(tasks)} --length 1600 --samples 2 --seed 3"
    try:
        kept = once.main([*asked.split(), "--out", str(tmp_path / "once")])
    finally:
        torch.set_num_threads(threads)
    assert torch.nn.functional.scaled_dot_product_attention is plain
    assert kept.hits > 0
    ask = Ask("reader", methods, tasks, (1600,), samples=2, seed=3)
    run(tiny, ask, tmp_path / "each")
    rows = [
        {cell_of(row): row for row in map(json.loads, (tmp_path / name / "rows.jsonl").read_text().splitlines())}
        for name in ("once", "each")
    ]
    assert rows[0].keys() == rows[1].keys() and len(rows[0]) == 6
    for cell, mine in rows[0].items():
        other = rows[1][cell]
        for name in other.keys() - set(TIMES):
            if isinstance(other[name], float):
                assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), (cell, name)
            else:
                assert mine[name] == other[name], (cell, name)
    lines = [read(tmp_path / name) for name in ("once", "each")]
    assert {c: [one["prompt"] for one in some] for c, some in lines[0].items()} == {
        c: [one["prompt"] for one in some] for c, some in lines[1].items()
    }
    # another prompt's attention is not given out
    q = torch.randn(1, 2, 1100, 8)
    for seed in (q, q + 1e-3):
        torch.testing.assert_close(
            kept(seed, seed, seed, is_causal=True), plain(seed, seed, seed, is_causal=True), rtol=1e-4, atol=1e-5
        )


def cell_of(row):
    return row["method"], row["task"], row["length"]
