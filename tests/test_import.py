"""What `import saccade` does in a fresh process: next to nothing."""

import subprocess
import sys

import pytest

import saccade

HEAVY = ("transformers", "matplotlib", "triton", "tokenizers", "rich", "pytest", "hypothesis")
SCRIPT = """
import sys, time
import torch
names = "empty matmul Tensor nn autograd".split()
before = [getattr(torch, n) for n in names], dict(vars(torch.Tensor)), sys.excepthook, dict(__import__("os").environ)
start = time.perf_counter()
import saccade
{extra}
took = time.perf_counter() - start
after = [getattr(torch, n) for n in names], dict(vars(torch.Tensor)), sys.excepthook, dict(__import__("os").environ)
assert all(a is b for a, b in zip(before[0], after[0]))
assert before[1:] == after[1:]
heavy = [m for m in {heavy!r} if m in sys.modules]
sys.stderr.write(f"{{took}} {{','.join(heavy)}}")
"""


def fresh(extra=""):
    code = SCRIPT.format(extra=extra, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    took, _, heavy = done.stderr.partition(" ")
    return float(took), heavy


def test_costs_and_does_nothing():
    took, heavy = fresh()
    assert took < 1.0
    assert heavy == ""


def test_methods_and_kernels_need_torch_alone():
    _, heavy = fresh("from saccade.core import table\n_ = [table.find(n) for n in table.METHODS], saccade.attend")
    assert heavy == ""


@pytest.mark.parametrize("name", saccade.__all__)
def test_public_names_are_there(name):
    found = getattr(saccade, name)
    assert found.__name__ == name
    assert found.__doc__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nonsense"):
        saccade.nonsense  # noqa: B018
    assert set(saccade.__all__) <= set(dir(saccade))
