"""Where Triton cannot be installed (no Linux on x86-64), its kernels and their tests are not collected.

The same holds for the model of lm-evaluation-harness, a subclass of the harness's own, where that is not installed.
"""

from importlib.util import find_spec

KERNELS = (
    "saccade/kernels/*/triton*.py",
    "saccade/kernels/attend/decode_*.py",
    "saccade/kernels/attend/lower.py",
    "tests/kernels/test_attend_backward.py",
    "tests/kernels/test_attend_decode.py",
    "tests/kernels/test_attend_triton.py",
    "tests/kernels/test_scan_triton.py",
    "tests/kernels/test_select_*.py",
    "tests/evaluate/test_bench_*.py",
)


HARNESS = ("saccade/evaluate/harness_model.py",)


def _there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:
        return False


collect_ignore_glob = [*(() if _there("triton") else KERNELS)]
collect_ignore_glob += () if _there("lm_eval") and _there("accelerate") else HARNESS
