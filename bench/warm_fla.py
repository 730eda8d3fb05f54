"""Compile flash-linear-attention's kernels before they are timed, on all cores: python bench/warm_fla.py

Its autotuner compiles hundreds of variants one after another, which takes minutes. Here each of several processes takes
every n-th variant (for a decay per head) and leaves it in Triton's cache on disk. Which is best is still found where it
is timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

LENGTH = 2048


def main() -> None:
    """Start the processes and wait for them."""
    count = min(16, os.cpu_count() or 1)
    running = [subprocess.Popen([sys.executable, __file__, str(part), str(count)]) for part in range(count)]
    sys.exit(max(process.wait() for process in running))


def compile_part(part: int, count: int) -> None:
    """Run the bench's calls with every `count`-th variant of each kernel."""
    import torch
    from triton.runtime.autotuner import Autotuner

    from saccade.evaluate.bench_scan import inputs, peer, timed

    whole: Callable[..., Any] = Autotuner.run
    cut: set[int] = set()

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) not in cut:
            cut.add(id(self))
            self.configs = self.configs[part::count] or self.configs[:1]
        return whole(self, *args, **kwargs)

    Autotuner.run = run
    name, theirs = peer(*inputs("head", LENGTH, 32, 128, torch.bfloat16, "cuda"))
    if name != "fla":
        sys.exit("flash-linear-attention is not installed")
    for direction in ("forward", "forward+backward"):
        timed(*theirs, "head", direction)()
    torch.cuda.synchronize()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        compile_part(int(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
