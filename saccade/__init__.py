"""saccade: content-based attention for long-context transformers.

Attention gives the answer. A Pattern says where to look. A CachePolicy says what is kept. A Layer is a module with
weights. A Plan says who does which, per layer and head.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# names -> modules, imported when first asked for, so that `import saccade` costs nothing
_EXPORTS = {
    "Assign": "saccade.core.plan",
    "Blocks": "saccade.core.pattern",
    "Call": "saccade.core.call",
    "Full": "saccade.core.pattern",
    "Groups": "saccade.core.pattern",
    "ModelShape": "saccade.core.plan",
    "Out": "saccade.kernels.merge",
    "Pattern": "saccade.core.pattern",
    "PerHead": "saccade.core.pattern",
    "Plan": "saccade.core.plan",
    "SaccadeError": "saccade.core.errors",
    "Session": "saccade.hf.attach",
    "Tokens": "saccade.core.pattern",
    "Union": "saccade.core.pattern",
    "Window": "saccade.core.pattern",
    "attach": "saccade.hf.attach",
    "attend": "saccade.kernels.attend.api",
    "doctor": "saccade.hf.doctor",
    "merge": "saccade.kernels.merge",
    "scan": "saccade.kernels.scan.api",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
