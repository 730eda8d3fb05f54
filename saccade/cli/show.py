"""`saccade show METHOD`: where a method really looks, in the terminal and as a PNG."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saccade.cli.arguments import add_model, key_value, load_model, positive
from saccade.cli.list import describe
from saccade.cli.main import Result
from saccade.cli.progress import warn
from saccade.core.errors import InputError, PlanError, UnsupportedError
from saccade.core.table import build, find

if TYPE_CHECKING:
    from torch import Tensor

    from saccade.core.plan import Plan
    from saccade.evaluate.model import Loaded

HELP = "draw where a method looks when the model reads a book with a planted fact"
LAYER_LENGTH = 128  # a layer's picture costs a backward pass per row
STEPS = 16


class Picture(NamedTuple):
    """What is drawn, and what is said about it."""

    kind: str
    panels: list[tuple[str, Tensor]]
    down: str
    across: str
    how: str
    data: dict[str, Any]
    extent: tuple[float, float] | None = None
    marks: tuple[float, ...] = ()


def arguments(parser: argparse.ArgumentParser) -> None:
    """Method, where to look, output."""
    parser.add_argument("method", metavar="METHOD", help="a name from `saccade list`, or several joined by +")
    parser.add_argument("--length", type=positive, default=2048, help="tokens of the prompt (2048)")
    parser.add_argument("--layer", type=int, help="layer to draw (default: where a head finds the fact)")
    parser.add_argument("--head", type=int, help="query head to draw (default: the one that finds the fact)")
    parser.add_argument(
        "--arg", action="append", type=key_value, default=[], metavar="KEY=VALUE", help="a hyperparameter, repeatable"
    )
    parser.add_argument("--out", metavar="FILE.png", help="picture file (saccade-out/show-METHOD.png)")
    parser.add_argument("--seed", type=int, default=0, help="of the document (0)")
    add_model(parser)


def run(args: argparse.Namespace) -> Result:
    """Watch the method at work and draw it."""
    from saccade.evaluate.report.panels import BLANK
    from saccade.evaluate.report.plot import save_panels
    from saccade.evaluate.report.text import draw

    given = dict(args.arg)
    names = [name.strip() for name in args.method.split("+")]
    is_layer = "layer" in find(names[0]).phases if len(names) == 1 else False
    picture = _layer(names[0], given, args) if is_layer else _method(names, given, args)
    path: Path | None = Path(args.out or f"saccade-out/show-{args.method}.png")
    try:
        save_panels(
            path,
            picture.panels,
            title=f"{args.method}: {picture.kind}",
            down=picture.down,
            across=picture.across,
            extent=picture.extent,
            marks=picture.marks,
        )
    except UnsupportedError as error:
        if args.out:
            raise
        warn(str(error))
        path = None
    title, shares = picture.panels[0]
    places = [mark / picture.extent[0] for mark in picture.marks] if picture.extent else []
    causal = picture.kind not in ("decode", "cache")
    how = picture.how if shares.any(-1).all() else f"{BLANK} {picture.how}"
    lines = [
        textwrap.fill(" ".join(describe(name)["idea"] for name in names), 80),
        "",
        f"{title}",
        draw(shares, picture.down, picture.across, causal=causal, marks=places),
        "",
        textwrap.fill(how, 80),
    ]
    data = {"method": args.method, "kind": picture.kind} | picture.data
    data |= {"how": how, "cells": [[round(x, 3) for x in row] for row in shares.tolist()]}
    data["png"] = None if path is None else str(path.resolve())
    return Result(data, "\n".join(lines + ([f"The picture: {path.resolve()}"] if path else [])))


def _method(names: list[str], given: dict[str, Any], args: argparse.Namespace) -> Picture:
    """A method of a plan, watched on the model."""
    from saccade.evaluate.demo import fact_span, write_document
    from saccade.evaluate.report import panels
    from saccade.evaluate.trace import trace

    for name in names:
        find(name)
    loaded = load_model(args)
    if line := loaded.beyond(args.length):
        warn(line)
    plan = _plan(args.method, given, loaded, args.length)
    document = write_document(loaded, args.length, 1, args.seed)
    ids = loaded.tokenizer(f"{document.text}\n\n{document.questions[0]}")["input_ids"]
    span = fact_span(loaded, document, 0)
    shape = loaded.shape
    every = tuple(range(shape.heads))
    dense = trace(loaded, None, ids, drawn=every, span=span)
    kind = panels.phase_of(plan)
    layer, head = _chosen(args, shape.layers, shape.heads)
    seen = dense if plan is None else trace(loaded, plan, ids, drawn=every, max_new_tokens=STEPS + 1)
    if layer is None:
        layer = seen.picked_layer("decode") if kind == "decode" else dense.finder()[0]
    head = int(dense.finders[layer].argmax()) if head is None else head
    others = [h for h in every if h != head][:3]
    where = f"The model is {loaded.name}, the prompt {len(ids)} tokens of a book with one planted fact (the triangle)."
    marks = (float(sum(span)) / 2,)
    data = {"model": loaded.name, "length": len(ids), "layer": layer, "head": head}
    phase = "decode" if kind == "decode" else "prefill"
    data |= {"density": _short(seen.density(phase)), "mass": _short(seen.meter.kept(phase))}
    if kind == "cache":
        title, kept = panels.kept_panel(seen)
        how = f"{panels.KEPT} {panels.reading(seen, plan)} {where}"
        return Picture(
            kind, [(title, kept)], "layers and heads", "key position", how, data, (len(ids), len(kept)), marks
        )
    if kind == "decode":
        drawn = [panels.steps_panel(seen, layer, h) for h in (head, *others)]
        how = f"{panels.STEPS} {panels.reading(seen, plan)} {where}"
        return Picture(kind, drawn, "generated tokens", "key position", how, data, (len(ids), len(drawn[0][1])), marks)
    drawn = [panels.prefill_panel(seen, layer, h) for h in (head, *others)]
    how = f"{panels.MASS if plan is None else panels.READ} {panels.reading(seen, plan)} {where}"
    return Picture(kind, drawn, "queries", "key position", how, data, (len(ids), len(ids)), marks)


def _layer(name: str, given: dict[str, Any], args: argparse.Namespace) -> Picture:
    """A layer with its own weights, untrained."""
    from saccade.evaluate.mixing import WIDTH, mixing, untrained
    from saccade.evaluate.report.panels import LAYER

    length = min(args.length, LAYER_LENGTH)
    shares = mixing(untrained(name, given, args.seed), length, int(given.get("width", WIDTH)), args.seed)
    pairs = length * (length + 1) / 2
    density = float((shares.tril() > 0).sum()) / pairs
    how = f"{LAYER} Nothing is trained here. {density:.0%} of the pairs of {length} tokens have any influence."
    data = {"model": None, "length": length, "layer": None, "head": None, "density": _short(density), "mass": None}
    panel = (f"untrained layer, {length} tokens", shares)
    return Picture("mixing", [panel], "output tokens", "input token", how, data, (length, length))


def _plan(method: str, given: dict[str, Any], loaded: Loaded, length: int) -> Plan | None:
    """The preset with the given hyperparameters put over it."""
    from saccade.evaluate.model import READER
    from saccade.evaluate.presets import DENSE, preset

    if method == DENSE:
        return None
    if given and "+" in method:
        raise PlanError("show: --arg needs a single method, so that it is clear whose argument it is")
    plan = preset(method, loaded.model, length, bundled=loaded.name == READER)
    if not given:
        return plan
    # says which argument is unknown before any layer is built
    build(method, {**next((a.args for row in plan.layers for a in row if a.method == method), {}), **given})
    layers = tuple(
        tuple(replace(a, args={**a.args, **given}) if a.method == method else a for a in row) for row in plan.layers
    )
    return replace(plan, layers=layers)


def _chosen(args: argparse.Namespace, layers: int, heads: int) -> tuple[int | None, int | None]:
    for name, value, count in (("layer", args.layer, layers), ("head", args.head, heads)):
        if value is not None and not 0 <= value < count:
            raise InputError(f"show: --{name} must be in 0..{count - 1}, got {value}")
    return args.layer, args.head


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
