"""The bench of decoding: one query against a long store, for several ways to look, against torch's SDPA over all of it.

Each call of a pass reads a store of its own, as the layers of a model do: otherwise a sparse call would find the keys
of the call before in the cache of the chip. A pass is timed as it is, and on a GPU also as a replayed CUDA graph, for
both sides alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from saccade.core.call import Call
from saccade.core.errors import SaccadeError
from saccade.core.pattern import Blocks, Full, Pattern, PerHead, Tokens, Window
from saccade.kernels.attend import attend
from saccade.kernels.attend.api import Impl
from saccade.kernels.here import on

LAYERS = {"cuda": 8, "cpu": 2}  # stores of a pass
HEADS = {"cuda": (32, 8, 128), "cpu": (4, 2, 64)}  # query heads, kv heads, width
CHECKED = 4096  # tokens of the correctness check
COPY = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes copied to learn the bandwidth


class Way(NamedTuple):
    """A way to look: its name, a call of it per store, the share of all keys that it reads, their bytes."""

    what: str
    run: Callable[[], None]
    density: float
    moved: float


def decode_rows(
    length: int = 131072,
    density: float = 1 / 16,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    repeats: int = 20,
) -> list[dict[str, Any]]:
    """One row for each way to look, each peer, and with and without a CUDA graph.

    Args:
        length: tokens in the store.
        density: share of them that the sparse ways read.
        dtype: of queries and store.
        device: "cuda" (32 query and 8 kv heads of width 128) or "cpu" (4 and 2 of width 64).
        repeats: passes, of which the median is given.

    Returns:
        Rows with: what (the pattern), impl, peer, device, dtype, length, density, graph (both sides replayed from a
        CUDA graph), ms and peer_ms of a call, speedup, gb_per_s (keys and values over ms), floor_ms (their bytes at
        the bandwidth of a copy in the same run).

    Raises:
        SaccadeError: a result is further from float64 than twice plain PyTorch's: nothing is timed then.
    """
    kind = torch.device(device).type
    D = HEADS[kind][2]
    impl: Impl = "triton" if kind == "cuda" else "tiled"
    check(density, dtype, device, impl)
    layers = [_tensors(length, dtype, device, seed) for seed in range(LAYERS[kind])]
    call = Call.of(layers[0][0], layers[0][1])

    def way(what: str, pattern: Pattern) -> Way:
        def run() -> None:
            for q, k, v in layers:
                attend(q, k, v, pattern, call, lse=False, impl=impl)

        return Way(what, run, pattern.density(call), _read(pattern, call) * 2 * D * dtype.itemsize)

    return _rows([way(*named) for named in _patterns(length, density, device)], layers, impl, device, repeats)


def store_rows(
    length: int = 131072, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", repeats: int = 20
) -> list[dict[str, Any]]:
    """As `decode_rows`, for stores that hold less: half of the kv heads keep 320 tokens (one launch), and int8 keys."""
    # these import Triton
    from saccade.kernels.attend.decode_groups import decode_groups, layout
    from saccade.kernels.attend.decode_quantized import decode_quantized, quantize

    kind = torch.device(device).type
    H, G, D = HEADS[kind]
    layers = [_tensors(length, dtype, device, seed) for seed in range(LAYERS[kind])]
    half, size = G // 2, min(320, length)
    near = Window(0, size)

    retrieval, streaming = tuple(range(half)), tuple(range(half, G))
    newest = torch.arange(length - size, length, dtype=torch.int32, device=device)
    pos = newest.expand(1, G - half, -1).contiguous()

    def groups(k: Tensor, v: Tensor) -> Any:
        full = [t[:, :half].contiguous() for t in (k, v)]
        short = [t[:, half:, length - size : length].contiguous() for t in (k, v)]
        held = [(retrieval, full[0], full[1], None, Full()), (streaming, short[0], short[1], pos, near)]
        return layout(held, H // G)

    lengths = torch.tensor([length] * half + [size] * (G - half) + [length], dtype=torch.int32, device=device)
    laid = [groups(k, v) for _, k, v in layers]
    small = [(quantize(k), quantize(v)) for _, k, v in layers]
    q, k, v = layers[0]
    apart = PerHead(((tuple(range(H // 2)), Full()), (tuple(range(H // 2, H)), near)))
    by_pattern = attend(q, k, v, apart, impl="triton").o
    _same("groups", decode_groups(q, laid[0], lengths).o, by_pattern)
    k8, v8 = small[0]
    meant = attend(q, k8.dequantize().to(dtype), v8.dequantize().to(dtype), impl="triton").o
    _same("int8", decode_quantized(q, k8, v8).o, meant)

    def by_group() -> None:
        for (q, _, _), where in zip(layers, laid, strict=True):
            decode_groups(q, where, lengths, lse=False)

    def by_integers() -> None:
        for (q, _, _), (keys, values) in zip(layers, small, strict=True):
            decode_quantized(q, keys, values, lse=False)

    held = half * (length + size)
    ways = [
        Way("half of the kv heads hold 320 tokens", by_group, held / (G * length), held * 2 * D * dtype.itemsize),
        Way("int8 keys and values", by_integers, 1.0, G * length * 2 * (D + 4)),
    ]
    return _rows(ways, layers, "triton", device, repeats)


def _rows(
    ways: list[Way], layers: list[tuple[Tensor, Tensor, Tensor]], impl: str, device: str, repeats: int
) -> list[dict[str, Any]]:
    """Time the ways and the peers."""
    kind = torch.device(device).type
    graphs = [False, True] if kind == "cuda" else [False]
    length, dtype = layers[0][1].shape[2], str(layers[0][0].dtype).removeprefix("torch.")
    rows = []
    with torch.inference_mode():
        bandwidth = _bandwidth(device, repeats)
        theirs = {
            (name, graph): _pass_ms(_peer(layers, backend), graph, repeats, device) / len(layers)
            for name, backend in _peers(kind)
            for graph in graphs
        }
        for way in ways:
            for graph in graphs:
                ms = _pass_ms(way.run, graph, repeats, device) / len(layers)
                for name, _ in _peers(kind):
                    peer_ms = theirs[name, graph]
                    rows.append(
                        {
                            "what": way.what,
                            "impl": impl,
                            "peer": name,
                            "device": device,
                            "dtype": dtype,
                            "length": length,
                            "density": round(way.density, 4),
                            "graph": graph,
                            "ms": round(ms, 4),
                            "peer_ms": round(peer_ms, 4),
                            "speedup": round(peer_ms / ms, 2),
                            "gb_per_s": round(way.moved / ms / 1e6, 1),
                            "floor_ms": round(way.moved / bandwidth * 1e3, 4),
                        }
                    )
    return rows


def check(density: float, dtype: torch.dtype, device: str, impl: Impl) -> None:
    """Raise SaccadeError unless every way to look is at most twice as far from float64 as plain PyTorch."""
    q, k, v = _tensors(CHECKED, dtype, device, 0)
    call = Call.of(q, k)
    for what, pattern in _patterns(CHECKED, density, device):
        truth = attend(q.double(), k.double(), v.double(), pattern, call, impl="reference").o
        ours = attend(q, k, v, pattern, call, impl=impl).o
        wide_k, wide_v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = (q @ wide_k.transpose(-1, -2)) * call.softmax_scale(q.shape[3])
        plain = (
            scores.masked_fill(~pattern.mask(call, torch.arange(1, device=q.device)), float("-inf")).softmax(-1)
            @ wide_v
        )
        error, allowed = ((o.double() - truth).abs().max().item() for o in (ours, plain))
        if not error <= 2 * allowed + 1e-6:
            raise SaccadeError(
                f"bench decode: {impl} over {what} in {dtype} is off by {error:.2e}, plain PyTorch by {allowed:.2e}: "
                "nothing was timed"
            )


def _same(what: str, got: Tensor, want: Tensor) -> None:
    error, size = (got.double() - want.double()).abs().max().item(), want.abs().max().item()
    if not error <= 0.02 * size:
        raise SaccadeError(f"bench decode: {what} is off by {error:.2e} of {size:.2e}: nothing was timed")


def _patterns(length: int, density: float, device: str) -> Iterator[tuple[str, Pattern]]:
    """The ways to look: all, blocks per kv head and per query head, single tokens per kv head."""
    H, G, _ = HEADS[torch.device(device).type]
    rng = torch.Generator().manual_seed(1)

    def some(heads: int, block: int) -> Tensor:
        count = -(-length // block)
        kept = max(1, round(count * density))
        picked = torch.rand(1, heads, 1, count, generator=rng).argsort(-1)[..., :kept]
        return picked.sort(-1).values.int().to(device)

    yield "full", Full()
    yield "blocks of 64 per kv head", Blocks(some(G, 64), 16, 64)
    yield "blocks of 128 per kv head", Blocks(some(G, 128), 16, 128)
    yield "blocks of 64 per query head", Blocks(some(H, 64), 16, 64)
    yield "tokens per kv head", Tokens(some(G, 1))


def _read(pattern: Pattern, call: Call) -> float:
    """Keys that must be fetched: once per kv head where the lists are per kv head, else per query head."""
    per_query_head = isinstance(pattern, (Blocks, Tokens)) and pattern.index.shape[1] > call.shape.G
    return pattern.pairs(call) / (1 if per_query_head else call.shape.H // call.shape.G)


def _tensors(length: int, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A query and a store with room to grow: k and v are views of its tensors."""
    H, G, D = HEADS[torch.device(device).type]
    rng = torch.Generator(device).manual_seed(seed)
    room = length + length // 8

    def draw(heads: int, count: int) -> Tensor:
        return torch.randn(1, heads, count, D, generator=rng, device=device, dtype=dtype)

    return draw(H, 1), draw(G, room)[:, :, :length], draw(G, room)[:, :, :length]


def _peers(kind: str) -> list[tuple[str, Any]]:
    """SDPA's own choices, by name."""
    if kind == "cpu":
        return [("sdpa", None)]
    from torch.nn.attention import SDPBackend

    return [("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION), ("sdpa-flash", SDPBackend.FLASH_ATTENTION)]


def _peer(layers: list[tuple[Tensor, Tensor, Tensor]], backend: Any) -> Callable[[], None]:
    from torch.nn.attention import sdpa_kernel

    def run() -> None:
        forced: AbstractContextManager[Any] = nullcontext() if backend is None else sdpa_kernel(backend)
        with forced:
            for q, k, v in layers:
                scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run


def _pass_ms(run: Callable[[], None], graph: bool, repeats: int, device: str) -> float:
    """Median milliseconds of a pass."""
    if graph:
        with on(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()
            torch.cuda.current_stream().wait_stream(side)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=side):
                run()
        run = captured.replay
    for _ in range(3):
        run()
    return median(_timed(run, device) for _ in range(repeats))


def _timed(run: Callable[[], None], device: str) -> float:
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    begin.record(stream)
    run()
    end.record(stream)
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def _bandwidth(device: str, repeats: int) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.zeros(COPY[torch.device(device).type], dtype=torch.int8, device=device)
    target = torch.zeros_like(source)

    def run() -> None:
        target.copy_(source)

    run()
    return 2 * len(source) / (median(_timed(run, device) for _ in range(repeats)) / 1e3)
