"""How a transformers model rotates the keys of a layer, as a Rope; None where that cannot be known."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from functools import lru_cache
from typing import Any

import torch

from saccade.core.rope import Rope


def rope_of(model: torch.nn.Module, attention: torch.nn.Module, config: Any, layer: int) -> Rope | None:
    """The rotation of one attention module's keys.

    None for models without rotary positions, for those whose frequencies change with the length (dynamic, longrope),
    where the pairing of channels is neither halves nor neighbours, and in layers that may be left without positions
    (Cohere 2, EXAONE 4) or rotate other channels than a head's first (multi-head latent attention).
    """
    if hasattr(attention, "qk_rope_head_dim") or (_chooses(type(attention)) and not getattr(attention, "use_rope", 0)):
        return None
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


@lru_cache
def _chooses(kind: type[torch.nn.Module]) -> bool:
    """Does the forward of attention modules ask the module itself whether to rotate? Unknown counts as yes."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return True
    asks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "self." in ast.unparse(node.test)]
    within = {call for node in asks for call in _turns(node)}
    # one that stands outside of such a question turns the queries of every layer
    return bool(within) and within.issuperset(_turns(tree))


def _turns(tree: ast.AST) -> set[ast.Call]:
    """The calls within that rotate, by their names."""
    return {node for node in ast.walk(tree) if isinstance(node, ast.Call) and "rotary" in ast.unparse(node.func)}
