"""The parts of a decoder that can be taken away and given back: blocks, heads, groups of neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saccade.core.errors import InputError, UnsupportedError
from saccade.core.plan import ModelShape

BLOCKS = {"attention": "attention", "head": "attention", "ffn": "ffn", "neurons": "ffn"}


@dataclass(frozen=True)
class Element:
    """A part of a decoder that can be taken away.

    Args:
        layer: where it is.
        kind: "attention" or "ffn" (the whole block), "head" or "neurons" (part of one).
        start, stop: query heads or neurons `start .. stop - 1`; of a whole block both are 0.

    Raises:
        InputError: another kind, or no such range.
    """

    layer: int
    kind: str
    start: int = 0
    stop: int = 0

    def __post_init__(self) -> None:
        if self.kind not in BLOCKS or self.layer < 0:
            raise InputError(f"Element: layer {self.layer}, kind {self.kind!r}: a layer >= 0 and {', '.join(BLOCKS)}")
        whole = self.kind == BLOCKS[self.kind]
        if not (self.start == self.stop == 0 if whole else 0 <= self.start < self.stop):
            raise InputError(
                f"Element: {self.kind} {self.start}:{self.stop}; heads and neurons have 0 <= start < stop, blocks 0:0"
            )

    @property
    def block(self) -> Element:
        """The block that it is, or that holds it."""
        return Element(self.layer, BLOCKS[self.kind])

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}" + (f" {self.start}:{self.stop}" if self != self.block else "")


class Part(NamedTuple):
    """One decoder layer's two last projections, and the query heads that the first one's columns belong to."""

    o_proj: nn.Linear
    down_proj: nn.Linear
    heads: int


def parts(model: Any) -> list[Part]:
    """Every layer's projections into the residual stream, first layer first.

    Args:
        model: a decoder of transformers, or a `saccade.nn.Transformer`: any whose layers hold one module with an
            `o_proj` and one with a `down_proj`.

    Raises:
        UnsupportedError: no such layers, other than the config says, or heads that do not divide o_proj's columns.
    """
    found = []
    for module in model.modules():
        mixers = [child for child in module.children() if isinstance(getattr(child, "o_proj", None), nn.Linear)]
        widths = [child for child in module.children() if isinstance(getattr(child, "down_proj", None), nn.Linear)]
        if len(mixers) == len(widths) == 1:
            heads = getattr(mixers[0], "heads", None) or ModelShape.of(model).heads
            found.append(Part(mixers[0].o_proj, widths[0].down_proj, heads))
    told = ModelShape.of(model).layers if hasattr(model, "config") else len(found)
    if not found or len(found) != told:
        raise UnsupportedError(
            f"parts: {type(model).__name__} has {len(found)} layers that hold an o_proj and a down_proj, of {told}; "
            "only decoders whose every layer has both, as linear maps, can be pruned"
        )
    for layer, part in enumerate(found):
        if part.o_proj.in_features % part.heads:
            raise UnsupportedError(
                f"parts: layer {layer}: o_proj reads {part.o_proj.in_features} channels, which {part.heads} heads "
                "do not divide"
            )
    return found


def elements(model: Any, *, group: int = 64) -> list[Element]:
    """A decoder's elements from coarse to fine: all blocks, then heads and groups of neurons; last layer first.

    Args:
        model: see `parts`.
        group: neurons that stand or fall together; the last group of a layer has what is left.

    Example:
        >>> from saccade.nn import Attention, Transformer
        >>> model = Transformer(9, 8, [Attention(8, heads=2)], mlp_width=10)
        >>> print(*elements(model, group=6), sep=", ")
        layer 0 attention, layer 0 ffn, layer 0 head 0:1, layer 0 head 1:2, layer 0 neurons 0:6, layer 0 neurons 6:10
    """
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise InputError(f"elements: group must be an int >= 1, in neurons, got {group!r}")
    numbered = list(enumerate(parts(model)))[::-1]
    coarse = [Element(layer, kind) for layer, _ in numbered for kind in ("attention", "ffn")]
    fine = []
    for layer, part in numbered:
        fine += [Element(layer, "head", head, head + 1) for head in range(part.heads)]
        wide = part.down_proj.in_features
        fine += [Element(layer, "neurons", at, min(at + group, wide)) for at in range(0, wide, group)]
    return coarse + fine


@contextmanager
def without(model: Any, removed: Iterable[Element]) -> Iterator[None]:
    """The model with elements taken away, as long as the block lasts.

    A head or a group of neurons adds exactly 0 (its columns of the last projection read zeros), a whole block adds
    exactly 0, bias included. Hooks do it: no weight is touched, and what was taken away gets a gradient of zero or
    none, so that the rest can be trained on. Time and memory are not saved.

    Args:
        model: see `parts`.
        removed: what to take away.

    Raises:
        InputError: an element that the model has not.
    """
    found = parts(model)
    hooks = []
    try:
        for (layer, block), gone in _columns(found, removed).items():
            linear = _linear(found[layer], block)
            if gone is None:
                hooks.append(linear.register_forward_hook(_silent))
            else:
                hooks.append(linear.register_forward_pre_hook(_deaf(gone.to(linear.weight.device))))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def remove(model: Any, removed: Iterable[Element]) -> None:
    """Take elements away for good: their columns of the last projections become 0, in place (of a block, bias too).

    All shapes stay as they are, so nothing is faster; and the zeros learn again if they are trained, so train first,
    under `without`.
    """
    found = parts(model)
    for (layer, block), gone in _columns(found, removed).items():
        linear = _linear(found[layer], block)
        if gone is None:
            linear.weight.zero_()
            if linear.bias is not None:
                linear.bias.zero_()
        else:
            linear.weight[:, gone.to(linear.weight.device)] = 0


def _columns(found: Sequence[Part], removed: Iterable[Element]) -> dict[tuple[int, str], Tensor | None]:
    """By layer and block, the input channels of its last projection that go, bool [channels]; None = the block."""
    gone: dict[tuple[int, str], Tensor | None] = {}
    for element in removed:
        if not 0 <= element.layer < len(found) or element.kind not in BLOCKS:
            raise InputError(f"parts: {element}: the model has layers 0..{len(found) - 1}, kinds {', '.join(BLOCKS)}")
        at = (element.layer, BLOCKS[element.kind])
        if element.kind == at[1]:
            gone[at] = None
            continue
        wide = _linear(found[element.layer], at[1]).in_features
        each = wide // found[element.layer].heads if element.kind == "head" else 1
        if element.stop > wide // each:
            raise InputError(f"parts: {element}: the layer has 0:{wide // each}")
        mask = gone.setdefault(at, torch.zeros(wide, dtype=torch.bool))
        if mask is not None:
            mask[element.start * each : element.stop * each] = True
    return gone


def _linear(part: Part, block: str) -> nn.Linear:
    return part.o_proj if block == "attention" else part.down_proj


def _silent(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _deaf(gone: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].masked_fill(gone, 0.0),)

    return hook
