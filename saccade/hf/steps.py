"""Steps: decode one token at a time without Python in between, as a CUDA graph that is captured once and replayed."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from saccade.cache.fixed import Fixed
from saccade.core.errors import InputError, UnsupportedError
from saccade.hf.cache import SaccadeCache, StoreLayer


class Steps:
    """One decoding step of an attached model, replayed.

    A step of a large model on a short query is hundreds of kernels of a few microseconds each; launched one by one from
    Python they cost more than they run. Here the step is captured as a CUDA graph: tokens, positions, keys and values
    stay where they are, and the place of the next token is a number on the device. On a CPU the same step runs
    without a graph. While steps are being made nothing is evicted; `close` (or the end of the `with` block) gives the
    cache back, with the new tokens, for `generate` or for a next question.

    Args:
        session: from `attach`; its plan's decode methods must work on stores with positions (dense, streaming, tidal).
        cache: from `session.cache()`, with a prompt in it; rows of equal length without padding.
        room: tokens that will come at most.
        graph: None = capture on a GPU.

    Raises:
        UnsupportedError: layers that the plan does not serve, ragged rows, or a method that needs the host.
        InputError: a cache that is not the session's, or more steps than there was room for.

    Example:
        with attach(model, plan) as session:
            cache = session.cache()
            token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            with session.steps(cache, room=64) as step:
                for _ in range(64):
                    token = step(token)[:, -1:].argmax(-1)
    """

    def __init__(self, session: Any, cache: SaccadeCache, room: int, graph: bool | None = None) -> None:
        if room < 1:
            raise InputError(f"steps: room must be >= 1, got {room}")
        layers = [layer for layer in cache.layers]
        if not layers or not all(isinstance(layer, StoreLayer) for layer in layers):
            raise UnsupportedError("steps: the plan must serve every layer; this cache has layers of transformers' own")
        if not all(layer.store.seen for layer in layers):
            raise InputError("steps: the cache is empty; run the prompt through the model first")
        self._layers, self._model, self.room, self.made = layers, session.model, room, 0
        device = next(session.model.parameters()).device
        self._graph: Any = None
        self._step = torch.zeros(1, dtype=torch.long, device=device)
        self._cache = cache
        for layer in layers:
            layer.fixed = Fixed(layer.store, room, self._step)
        self._seen, rows = layers[0].store.seen[0], len(layers[0].store.seen)
        self._token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._out: Tensor | None = None
        try:
            if device.type == "cuda" if graph is None else graph:
                self._capture()
        except BaseException:
            self.close()
            raise

    def __call__(self, token: Tensor) -> Tensor:
        """Logits [B,1,vocabulary] after one token [B,1] more; the tensor is written again by the next step."""
        if self.made == self.room:
            raise InputError(f"steps: there was room for {self.room} tokens; close() and make new steps")
        self._token.copy_(token)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._out = self._forward()
        self._step += 1
        self.made += 1
        assert self._out is not None
        return self._out

    def close(self) -> None:
        """Give the cache back with the tokens that came."""
        for layer in self._layers:
            if layer.fixed is not None:
                layer.fixed.close(self.made)
                layer.fixed = None
        self._graph = None

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @torch.no_grad()
    def _forward(self) -> Tensor:
        positions = (self._step + self._seen)[None].expand(self._token.shape[0], 1)
        out = self._model(self._token, position_ids=positions, past_key_values=self._cache, use_cache=True)
        logits: Tensor = out.logits
        return logits

    def _capture(self) -> None:
        # compile and allocate outside: what is written goes to the slot that the first real step writes again
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = self._forward()
