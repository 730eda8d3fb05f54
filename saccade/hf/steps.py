"""Steps: decode one token at a time without Python in between, as CUDA graphs that are captured once and replayed."""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.cache.fixed import Fixed, Place
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.lasting import lasting
from saccade.hf.cache import SaccadeCache, StoreLayer
from saccade.kernels.here import on


class Captured(NamedTuple):
    """A step as a graph: what it answers, and the queries of each layer that it leaves."""

    graph: Any
    out: Tensor
    asked: list[Tensor | None]


class Steps:
    """One decoding step of an attached model, replayed.

    A step of a large model on a short query is hundreds of kernels of a few microseconds each; launched one by one from
    Python they cost more than they run. Here the step is captured as a CUDA graph: tokens, positions, keys and values
    stay where they are, and the place of the next token is a number on the device. A method that does more in some
    steps than in others (a search now and then) has a graph for each kind; the host, which counts positions, knows
    which is due. On a CPU the same steps run without graphs. While steps are being made nothing is evicted; `close` (or
    the end of the `with` block) gives the cache back, with the new tokens, for `generate` or for a next question.

    Args:
        session: from `attach`; its plan decodes densely or with streaming, tidal, quest, recycled, hip or hard, under
            any cache policy that they serve.
        cache: from `session.cache()`, with a prompt in it; rows of equal length without padding.
        room: tokens that will come at most.
        graph: None = capture on a GPU.

    Raises:
        UnsupportedError: layers that the plan does not serve, ragged rows, a method that needs the host, or a model
            that is spread over several devices.
        InputError: a cache that is not the session's, or more steps than there was room for.

    Example:
        with attach(model, plan) as session:
            cache = session.cache()
            token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            with session.steps(cache, room=64) as step:
                for _ in range(64):
                    token = step(token)[:, -1:].argmax(-1)
    """

    @lasting
    def __init__(self, session: Any, cache: SaccadeCache, room: int, graph: bool | None = None) -> None:
        if room < 1:
            raise InputError(f"steps: room must be >= 1, got {room}")
        layers = [layer for layer in cache.layers]
        if not layers or not all(isinstance(layer, StoreLayer) for layer in layers):
            raise UnsupportedError("steps: the plan must serve every layer; this cache has layers of transformers' own")
        if not all(layer.store.seen for layer in layers):
            raise InputError("steps: the cache is empty; run the prompt through the model first")
        self._layers, self._model, self.room = layers, session.model, room
        self._device = device = _device_of(session.model)
        self._seen, rows = layers[0].store.seen[0], len(layers[0].store.seen)
        self._place = Place(self._seen, device)
        self._cache = cache
        self._graphs: dict[Any, Captured] = {}
        self._token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._captures = device.type == "cuda" if graph is None else graph
        self._side: Any = None
        try:
            for layer in layers:
                layer.fixed = Fixed(layer.store, room, self._place)
            if self._captures:
                self._check()
                # all graphs are captured on one stream: only then do they share their memory
                self._side = torch.cuda.Stream(device)
                # methods make their memory ready, and say which kinds of step there are
                self._rehearse(1)
                self._captured()
        except BaseException:
            self.close()
            raise

    @property
    def made(self) -> int:
        """Tokens that came so far."""
        return self._place.made

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the methods of each layer say of the newest step: steps of one kind run the same graph."""
        at = self._seen + max(0, self.made - 1)
        return tuple(layer.fixed.turns(at) for layer in self._layers)

    def __call__(self, token: Tensor) -> Tensor:
        """Logits [B,1,vocabulary] after one token [B,1] more; the tensor is written again by later steps."""
        if self.made == self.room:
            raise InputError(f"steps: there was room for {self.room} tokens; close() and make new steps")
        self._token.copy_(token)
        if self._captures:
            with on(self._device):
                step = self._captured()
                step.graph.replay()
            out = step.out
            for layer, asked in zip(self._layers, step.asked, strict=True):
                layer.fixed.asked = asked
        else:
            out = self._forward()
        self._place.tick()
        return out

    def close(self) -> None:
        """Give the cache back with the tokens that came."""
        for layer in self._layers:
            if layer.fixed is not None:
                layer.fixed.close(self.made)
                layer.fixed = None
        self._graphs = {}

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check(self) -> None:
        """Raise UnsupportedError where a graph would have to wait for the host."""
        policies = [stretch.policy for layer in self._layers for stretch in layer.fixed.stretches]
        far = next((policy for policy in policies if getattr(policy, "lossless", False)), None)
        if far is not None:
            raise UnsupportedError(
                f"steps: {type(far).__name__} keeps tokens where only the host reads them, and a graph cannot wait for "
                "it; decode without steps"
            )

    @torch.no_grad()
    def _forward(self) -> Tensor:
        positions = self._place.at[None].expand(self._token.shape[0], 1)
        try:
            out = self._model(self._token, position_ids=positions, past_key_values=self._cache, use_cache=True)
        except UnsupportedError as error:
            raise UnsupportedError(
                "steps: a method needs to know more than a step of a fixed shape can tell it; decode without steps, or "
                f"choose dense, streaming, tidal, quest, recycled, hip or hard. It says: {error}"
            ) from error
        logits: Tensor = out.logits
        return logits

    def _captured(self) -> Captured:
        """The graph for the step that comes next, captured when a step of its kind first comes."""
        at = self._seen + self.made
        kind = tuple(layer.fixed.turns(at) for layer in self._layers)
        if kind not in self._graphs:
            pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
            self._rehearse(2)
            # a graph belongs to the device that is the current one, and without a stream to the first that captured
            with on(self._device):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=self._side):
                    out = self._forward()
            self._graphs[kind] = Captured(graph, out, [layer.fixed.asked for layer in self._layers])
        return self._graphs[kind]

    def _rehearse(self, times: int) -> None:
        """Compile and allocate outside of a capture; what is written goes where the step itself writes it again."""
        with on(self._device):
            now = torch.cuda.current_stream(self._device)
            self._side.wait_stream(now)
            with torch.cuda.stream(self._side):
                for _ in range(times):
                    self._forward()
            now.wait_stream(self._side)


def _device_of(model: Any) -> torch.device:
    """Where the model is."""
    devices = {weights.device for weights in model.parameters()}
    if len(devices) > 1:
        named = ", ".join(sorted(map(str, devices)))
        raise UnsupportedError(
            f"steps: the model is spread over {named}, and the place of the next token is a number on one device; "
            "decode without steps, or load the model onto one device"
        )
    return devices.pop()
