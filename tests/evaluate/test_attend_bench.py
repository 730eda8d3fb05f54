import pytest
import torch

from saccade.core.errors import InputError, SaccadeError
from saccade.evaluate import bench
from saccade.evaluate.bench import Case, check, measure, random_blocks


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_blocks_have_the_density_asked_for(density):
    case = Case(2048, density, heads=2, kv_heads=1, width=8)
    blocks, measured = random_blocks(case, 2048)
    call = bench._call(case, 2048)
    assert measured == pytest.approx(density, abs=0.035)
    mask = blocks.mask(call)
    assert measured == pytest.approx(float(mask.sum()) / (2 * 2048 * 2049 / 2))
    assert mask.diagonal(dim1=2, dim2=3).all()


def test_row_has_the_promised_fields():
    row = measure(Case(300, 0.3, width=8), repeat=1)
    wanted = ["impl", "peer", "device", "dtype", "length", "density", "ms", "peer_ms", "speedup"]
    assert list(row)[:9] == wanted
    assert row["speedup"] == pytest.approx(row["peer_ms"] / row["ms"], rel=0.05)


def test_nothing_is_timed_when_the_numbers_are_wrong(monkeypatch):
    real = bench.attend

    def off(*args, impl, **kwargs):
        out = real(*args, impl=impl, **kwargs)
        return out._replace(o=out.o * 1.001) if impl == "tiled" else out

    monkeypatch.setattr(bench, "attend", off)
    with pytest.raises(SaccadeError, match="nothing was timed"):
        measure(Case(256, 0.3, width=8), repeat=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiled_is_as_exact_as_plain_pytorch(dtype):
    error, allowed = check(Case(256, 0.3, width=16, dtype=dtype))
    assert 0 < error <= 2 * allowed + 1e-7


def test_refuses():
    with pytest.raises(InputError, match="density"):
        Case(128, 0.0)
    with pytest.raises(InputError, match="share"):
        Case(128, 0.1, heads=3, kv_heads=2)
