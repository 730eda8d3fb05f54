"""Maps of heads against the meter of whole layers and a mask counted by hand."""

import pytest
import torch

from saccade.core.plan import Assign, Plan
from saccade.evaluate import samples
from saccade.evaluate.headmap import FILE, HeadMeter, lines_of
from saccade.evaluate.report.folder import read_folders
from saccade.evaluate.run import Ask, run
from saccade.evaluate.trace import trace


@pytest.mark.parametrize("method", ["streaming", "minference", "quest", "s2"])
def test_heads_add_up_to_what_the_meter_says(tiny, method):
    from saccade.evaluate.presets import resolve

    ids = torch.randint(3, 4096, (500,)).tolist()
    found = trace(tiny, resolve(method, tiny, 512), ids).meter
    for phase in ("prefill", "decode"):
        density, mass = (torch.tensor(found.grid(phase, what, 4, 4)) for what in ("density", "mass"))
        assert density.shape == mass.shape == (4, 4)
        assert float(density.mean()) == pytest.approx(found.density(phase), abs=2e-4)
        assert float(mass.mean()) == pytest.approx(found.kept(phase), abs=2e-4)
        for layer in range(4):
            assert float(density[layer].mean()) == pytest.approx(found.density(phase, layer), abs=2e-4)


def test_heads_with_other_windows_are_told_apart(tiny):
    narrow = Assign((1,), "streaming", {"sink": 2, "recent": 30})
    wide = Assign((3,), "streaming", {"sink": 2, "recent": 100})
    shape = tiny.shape
    plan = Plan(shape, ((narrow, wide), *[()] * (shape.layers - 1)))
    found = trace(tiny, plan, torch.randint(3, 4096, (200,)).tolist()).meter.grid("prefill", "density", 4, 4)

    def share(recent):
        rows = torch.arange(200)
        gap = rows[:, None] - rows
        seen = (gap >= 0) & ((gap < recent) | (rows < 2))
        return float(seen.sum() / (gap >= 0).sum())

    # tiles are read whole, so a window may come out wider, and dense heads may not be watched at all
    assert share(30) - 1e-4 <= found[0][1] < found[0][3]
    assert share(100) - 1e-4 <= found[0][3] <= 1
    assert found[0][0] in (None, 1.0) and found[1][1] in (None, 1.0)


def test_nothing_seen_gives_no_line():
    assert lines_of(("m", "t", 8), HeadMeter(), 2, 2) == []


def test_the_runner_writes_what_the_report_reads(tiny, tmp_path):
    run(tiny, Ask("tiny", ("dense", "streaming"), ("needle",), (400,), samples=1), tmp_path)
    (folder,) = read_folders([tmp_path])
    assert (tmp_path / FILE).is_file() and (tmp_path / samples.FILE).is_file()
    assert [(line["method"], line["phase"]) for line in folder.heads] == [
        ("streaming", p) for p in ("prefill", "decode")
    ]
    assert all(len(line["density"]) == 4 and len(line["density"][0]) == 4 for line in folder.heads)
