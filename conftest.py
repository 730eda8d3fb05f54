"""Where Triton cannot be installed (no Linux on x86-64), its kernels and their tests are not collected."""

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


def _there() -> bool:
    try:
        return find_spec("triton") is not None
    except ValueError:
        return False


collect_ignore_glob = [] if _there() else list(KERNELS)
