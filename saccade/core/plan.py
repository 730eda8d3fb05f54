"""Plan: who does what, per layer and head, as plain data with a checked schema."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from saccade.core.errors import FileError, PlanError, SaccadeError
from saccade.core.files import write_whole
from saccade.core.table import METHODS, build, find

VERSION = 1
PHASES = ("prefill", "decode", "cache")
LIMIT = 64 << 20  # a plan file larger than this is not a plan
LARGEST = 1 << 53  # no hyperparameter is larger


@dataclass(frozen=True)
class ModelShape:
    """What of a model a plan depends on: layers, query heads, key-value heads, and a name for people."""

    layers: int
    heads: int
    kv_heads: int
    name: str = ""

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """From a ModelShape, a Hugging Face model, or its config."""
        if isinstance(model, cls):
            return model
        config = getattr(model, "config", model)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = getattr(config, "num_attention_heads", None)
        layers = getattr(config, "num_hidden_layers", None)
        if not isinstance(heads, int) or not isinstance(layers, int):
            raise PlanError(f"{type(model).__name__} does not say how many layers and heads it has; give a ModelShape")
        kv = getattr(config, "num_key_value_heads", None) or heads
        return cls(layers, heads, kv, str(getattr(config, "_name_or_path", "") or getattr(config, "model_type", "")))


@dataclass(frozen=True)
class Assign:
    """Some heads of one layer use a method in one phase.

    Args:
        heads: head ids, or None for all. Query heads in prefill and decode, key-value heads in cache.
        method: name in the table (`saccade list`).
        args: hyperparameters; a number may be a length rule {"base": b, "slope": s}, meaning b + s * length.
        phase: "prefill" (more than 16 queries, or the first call), "decode" (up to 16 with a past), or "cache".
    """

    heads: tuple[int, ...] | None
    method: str
    args: dict[str, Any] = field(default_factory=dict)
    phase: str = "prefill"

    def __post_init__(self) -> None:
        if not isinstance(self.args, dict):
            raise PlanError(f"{self.method}: args must be a dict of hyperparameters, got {str(self.args)[:60]!r}")
        heads = self.heads
        if heads is not None:
            heads = tuple(heads) if isinstance(heads, Iterable) else (None,)
            if any(isinstance(h, bool) or not isinstance(h, int) for h in heads):
                raise PlanError(f"{self.method}: heads must be numbers of heads or None, got {str(self.heads)[:60]}")
        # as JSON gives it back
        object.__setattr__(self, "heads", heads)
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in self.args.items()}
        object.__setattr__(self, "args", plain)

    def build(self, length: int = 0) -> Any:
        """The method itself, its length rules worked out for this many tokens."""
        args = {key: _rule(self.method, key, value, length) for key, value in self.args.items()}
        return build(self.method, args)

    @property
    def rules(self) -> bool:
        """Does any argument depend on the length?"""
        return _ruled(self.args)


@dataclass(frozen=True)
class Plan:
    """Assignments for every layer of a model. Heads that no assignment names are dense and keep everything.

    Example:
        >>> plan = Plan.uniform(ModelShape(2, 4, 2), prefill=("streaming", {"sink": 4, "recent": 64}))
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    model: ModelShape
    layers: tuple[tuple[Assign, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        _check_shape(self.model, "plan: model")
        if len(self.layers) != self.model.layers:
            raise PlanError(
                f"plan: {len(self.layers)} layers are listed, but the model it names has {self.model.layers}"
            )
        for at, layer in enumerate(self.layers):
            taken: dict[str, set[int]] = {phase: set() for phase in PHASES}
            for assign in layer:
                if not isinstance(assign, Assign):
                    raise PlanError(f"plan: layer {at}: a list of Assign is needed, got {str(assign)[:60]!r} in it")
                _check_assign(assign, at, self.model, taken.get(assign.phase, set()))

    @classmethod
    def uniform(
        cls, model: Any, *, prefill: Any = None, decode: Any = None, cache: Any = None, skip: Iterable[int] = ()
    ) -> Plan:
        """The same methods for all heads of all layers.

        Args:
            model: a ModelShape, a Hugging Face model or config.
            prefill, decode, cache: a method (instance, name, or (name, args)), or None for dense and keep-all.
            skip: layers left dense.

        Raises:
            PlanError: no such method or layer, or a method that does not work there.
        """
        shape = ModelShape.of(model)
        given = [
            (phase, method)
            for phase, method in zip(PHASES, (prefill, decode, cache), strict=True)
            if method is not None
        ]
        row = tuple(Assign(None, *_named(method), phase) for phase, method in given)
        left = set(skip) if isinstance(skip, Iterable) else {skip}
        if not left <= set(range(shape.layers)) or not isinstance(skip, Iterable):
            raise PlanError(f"plan: skip must be a list of layers in 0..{shape.layers - 1}, got {str(skip)[:60]}")
        return cls(shape, tuple(() if i in left else row for i in range(shape.layers)))

    @classmethod
    def per_head(cls, model: Any, assigns: Sequence[Sequence[Assign]], note: str = "") -> Plan:
        """From a list of assignments per layer."""
        wrong = [row for row in assigns if isinstance(row, str) or not isinstance(row, Iterable)]
        if wrong:
            raise PlanError(f"plan: a list of Assign for each layer is needed, got {str(wrong[0])[:60]!r}")
        return cls(ModelShape.of(model), tuple(tuple(layer) for layer in assigns), note)

    def also(self, other: Plan) -> Plan:
        """Both plans' assignments: say prefill from one and cache from the other."""
        self.check_model(other.model)
        layers = tuple(a + b for a, b in zip(self.layers, other.layers, strict=True))
        return Plan(self.model, layers, "; ".join(n for n in (self.note, other.note) if n))

    def check_model(self, model: Any) -> None:
        """Raise PlanError unless the plan fits this model's layers and heads."""
        shape = ModelShape.of(model)
        if (shape.layers, shape.heads, shape.kv_heads) != (self.model.layers, self.model.heads, self.model.kv_heads):
            raise PlanError(
                f"this plan is for {_say(self.model)}, the model has {_say(shape)}; make a plan for this model"
            )

    def phase(self, layer: int, phase: str) -> tuple[Assign, ...]:
        """The assignments of one layer in one phase."""
        return tuple(assign for assign in self.layers[layer] if assign.phase == phase)

    def to_json(self) -> str:
        """The plan as JSON text."""
        layers = [
            [{**asdict(a), "heads": None if a.heads is None else list(a.heads)} for a in row] for row in self.layers
        ]
        data = {"saccade_plan": VERSION, "model": asdict(self.model), "note": self.note, "layers": layers}
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """A plan from JSON text; everything in it is checked before anything is built.

        Raises:
            PlanError: not JSON, not a plan, a newer version, wrong types, unknown methods or arguments.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{where}: not readable as JSON ({error}); is the file whole?") from None
        if not isinstance(data, dict) or "saccade_plan" not in data:
            raise PlanError(f"{where}: not a saccade plan (no 'saccade_plan'); published files: saccade.fit.published")
        if type(data["saccade_plan"]) is not int or data["saccade_plan"] != VERSION:
            raise PlanError(f"{where}: plan version {data['saccade_plan']!r}, this saccade reads version {VERSION}")
        extra = set(data) - {"saccade_plan", "model", "note", "layers"}
        if extra:
            raise PlanError(f"{where}: unknown fields {sorted(extra)}")
        model = _typed(data.get("model"), dict, f"{where}: model")
        given, known = set(model), {"layers", "heads", "kv_heads", "name"}
        if given - known or known - given - {"name"}:
            raise PlanError(f"{where}: model: has layers, heads, kv_heads and a name; got {sorted(given)}")
        shape = ModelShape(**model)
        _check_shape(shape, f"{where}: model")
        layers = []
        for at, row in enumerate(_typed(data.get("layers"), list, f"{where}: layers")):
            layers.append(
                tuple(_assign(entry, f"{where}: layer {at}") for entry in _typed(row, list, f"{where}: layer {at}"))
            )
        note = _typed(data.get("note", ""), str, f"{where}: note")
        try:
            return cls(shape, tuple(layers), note)
        except SaccadeError as error:
            # of several files the person must know which
            raise type(error)(f"{where}: {str(error).removeprefix('plan: ')}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan; the file is whole or not there."""
        write_whole(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file."""
        return cls.from_json(read_text(path), str(path))


def read_text(path: str | os.PathLike[str]) -> str:
    """A small text file, or a FileError that says what is wrong with it."""
    try:
        size = Path(path).stat().st_size
        if size > LIMIT:
            raise FileError(f"{path}: {size} bytes are too many for a plan")
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FileError(f"{path}: not a text file") from None
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise FileError(f"{path}: a folder, not a file") from None


def _named(method: Any) -> tuple[str, dict[str, Any]]:
    """(name, args) of a method given as instance, name or pair."""
    if isinstance(method, str):
        return method, {}
    if isinstance(method, tuple) and len(method) == 2 and isinstance(method[1], dict):
        return method[0], dict(method[1])
    if is_dataclass(method) and not isinstance(method, type):
        for name, place in METHODS.items():
            if place == f"{type(method).__module__}:{type(method).__qualname__}":
                return name, asdict(method)
        if hasattr(method, "phases"):
            place = f"{type(method).__module__}:{type(method).__qualname__}"
            raise PlanError(
                f"{type(method).__name__} has no name that a plan could hold; give it one: "
                f"saccade.core.table.METHODS['name'] = {place!r}"
            )
    raise PlanError(f"{method!r} is neither a method, its name, nor (name, args)")


def _check_shape(shape: ModelShape, where: str) -> None:
    for name in ("layers", "heads", "kv_heads"):
        if not 0 < _typed(getattr(shape, name), int, f"{where}.{name}") <= 1 << 16:
            raise PlanError(f"{where}.{name} must be 1 to 65536, got {str(getattr(shape, name))[:60]}")
    if shape.heads % shape.kv_heads:
        raise PlanError(f"{where}: {shape.heads} heads cannot share {shape.kv_heads} kv_heads; use a multiple")
    _typed(shape.name, str, f"{where}.name")


def _check_assign(assign: Assign, at: int, model: ModelShape, taken: set[int]) -> None:
    where = f"plan: layer {at}, {assign.method}"
    if assign.phase not in PHASES:
        raise PlanError(f"{where}: phase must be one of {', '.join(PHASES)}, got {assign.phase!r}")
    count = model.kv_heads if assign.phase == "cache" else model.heads
    heads = range(count) if assign.heads is None else assign.heads
    wrong = [h for h in heads if not 0 <= h < count]
    if wrong or len(set(heads)) != len(heads) or not heads:
        kind = "key-value heads" if assign.phase == "cache" else "query heads"
        raise PlanError(f"{where}: heads must be distinct {kind} in 0..{count - 1}, got {list(heads)}")
    if taken & set(heads):
        raise PlanError(f"{where}: heads {sorted(taken & set(heads))} already have a {assign.phase} method")
    taken |= set(heads)
    phases: tuple[str, ...] = getattr(find(assign.method), "phases", ())
    if assign.phase not in phases:
        raise PlanError(f"{where}: works in {', '.join(phases)}, not in {assign.phase}")
    try:
        built = assign.build(length=4096)
    except SaccadeError as error:
        raise type(error)(f"plan: layer {at}, {error}") from None
    if assign.phase not in built.phases:
        raise PlanError(f"{where}: with these arguments it works in {', '.join(built.phases)}, not in {assign.phase}")
    made = getattr(built, "weights_for", None)
    if made is not None and (made.layers, made.heads) != (model.layers, model.heads):
        raise PlanError(
            f"{where}: its weights are for {made.layers} layers of {made.heads} query heads, the plan's model has "
            f"{model.layers} of {model.heads}; give weights that were trained for this model"
        )


def _assign(entry: Any, where: str) -> Assign:
    entry = _typed(entry, dict, where)
    extra = set(entry) - {"heads", "method", "args", "phase"}
    if extra or "method" not in entry:
        raise PlanError(f"{where}: an assignment has heads, method, args, phase; got {sorted(entry)}")
    heads = entry.get("heads")
    if heads is not None:
        heads = tuple(_typed(h, int, f"{where}: heads") for h in _typed(heads, list, f"{where}: heads"))
    method = _typed(entry["method"], str, f"{where}: method")
    args = _typed(entry.get("args", {}), dict, f"{where}: args")
    return Assign(heads, method, args, _typed(entry.get("phase", "prefill"), str, f"{where}: phase"))


def _ruled(args: dict[str, Any]) -> bool:
    """Is there a length rule among the arguments, or among those of a method inside them?"""
    inside = [v for v in args.values() if isinstance(v, dict)]
    return any(_ruled(v.get("args", {})) if "method" in v else True for v in inside)


def _rule(method: str, key: str, value: Any, length: int) -> Any:
    if isinstance(value, dict) and "method" in value and set(value) <= {"method", "args"}:
        # a wrapper's inner method
        inner = _typed(value.get("args", {}), dict, f"{method}: {key}: args")
        args = {k: _rule(str(value["method"]), k, v, length) for k, v in inner.items()}
        return {"method": _typed(value["method"], str, f"{method}: {key}: method"), "args": args}
    numbers = list(value.values()) if isinstance(value, dict) else [value]
    if any(type(x) in (int, float) and abs(x) > LARGEST for x in numbers):
        raise PlanError(f"{method}: {key} is too large: {str(value)[:60]}")
    if not isinstance(value, dict):
        return value
    fine = all(type(x) in (int, float) and math.isfinite(x) for x in numbers)
    if set(value) != {"base", "slope"} or not fine:
        raise PlanError(f"{method}: {key} must be a value or a length rule {{'base', 'slope'}}, got {str(value)[:200]}")
    return max(1, round(value["base"] + value["slope"] * length))


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise PlanError(f"{where}: must be {kind.__name__}, got {type(value).__name__} {str(value)[:60]!r}")
    return value


def _say(shape: ModelShape) -> str:
    name = f"{shape.name}: " if shape.name else ""
    return f"{name}{shape.layers} layers, {shape.heads} query heads, {shape.kv_heads} kv heads"
