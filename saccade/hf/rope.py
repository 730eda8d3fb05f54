"""How a transformers model rotates the keys of a layer, as a Rope; None where that cannot be known."""

from __future__ import annotations

import sys
from typing import Any

import torch

from saccade.core.rope import Rope


def rope_of(model: torch.nn.Module, attention: torch.nn.Module, config: Any, layer: int) -> Rope | None:
    """The rotation of one attention module's keys.

    None for models without rotary positions, for those whose frequencies change with the length (dynamic, longrope),
    and where the pairing of channels is neither halves nor neighbours.
    """
    kinds = getattr(config, "layer_types", None)
    kind = f"{kinds[layer]}_" if kinds else ""
    for module in model.modules():
        found = [getattr(module, name, None) for name in (f"{kind}inv_freq", "inv_freq")]
        frequencies = next((t for t in found if isinstance(t, torch.Tensor)), None)
        if frequencies is None:
            continue
        rules = getattr(module, "rope_type", "default")
        rules = rules.get(kinds[layer], "default") if isinstance(rules, dict) and kinds else rules
        pairing = _interleaved(attention)
        if pairing is None or rules in ("dynamic", "longrope"):
            return None
        return Rope(frequencies.detach().float(), pairing)
    return None


def _interleaved(attention: torch.nn.Module) -> bool | None:
    """How the module's own file pairs channels: it is asked with a vector of four."""
    half = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    if half is None:
        return None
    turned = half(torch.arange(1.0, 5.0)).tolist()
    return {(-3.0, -4.0, 1.0, 2.0): False, (-2.0, 1.0, -4.0, 3.0): True}.get(tuple(turned))
