"""The bench of attention alone on a GPU: the kernels beside SDPA's and FlexAttention, on the same tensors.

Forwards and backwards over random blocks, and forwards over columns and diagonals with their selection. Each kernel is
checked on sampled rows before it is timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from saccade.core.call import Call
from saccade.core.pattern import Blocks, Full, Pattern
from saccade.evaluate.bench import Case, random_blocks, tensors
from saccade.evaluate.bench_clock import LEAST, Ceiling, ceiling, gate, median_ms, row
from saccade.kernels.attend import attend
from saccade.methods.select.minference import MInference

ROWS = 32  # queries of each head that the gate looks at
GRADIENT_LENGTH = 2048  # tokens of the gate of the gradients
DENSE = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}
PEERS = (*DENSE, "flex")
COLUMNS, DIAGONALS = 1000, 6096  # the published setting of vertical-slash heads
CLUSTERS, SPREAD, PEAK = 4, 400.0, 30.0  # of diagonals: how many in a head, their width in tokens, their logit


def attend_rows(
    length: int,
    densities: Sequence[float],
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    repeats: int = LEAST,
    *,
    impl: str = "triton",
    peers: Sequence[str] = PEERS,
    backward: bool = False,
    slash: bool = False,
    heads: int = 32,
    kv_heads: int = 8,
    width: int = 128,
    block: int = 128,
    limits: Ceiling | None = None,
    done: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows for one length: each density against each peer that runs here.

    Dense peers do the same at every density and are timed once. A peer that cannot run is left out and `done` says why.

    Args:
        length: tokens.
        densities: shares of the causal pairs to read, in random blocks with a list for each query head.
        dtype, device: of the tensors.
        repeats: runs of a median.
        impl: of `attend`.
        peers: of PEERS.
        backward: also the gradients of q, k and v.
        slash: also columns and diagonals, chosen by MInference from inputs whose diagonals come in clusters.
        heads, kv_heads, width, block: of the tensors and lists.
        limits: the machine's ceilings; None = measured here.
        done: called with a few words after each step.

    Raises:
        SaccadeError: a kernel is wrong; nothing is timed then.
    """
    say = done or (lambda text: None)
    limits = ceiling(device, dtype) if limits is None else limits
    found: list[dict[str, Any]] = []
    dense: dict[tuple[str, str], float] = {}
    q, k, v = tensors(_case(length, 1.0, heads, kv_heads, width, block, dtype, device), length)
    call = Call.of(q, k)
    directions = ("forward", "backward") if backward else ("forward",)

    def against(direction: str, peer: str, pattern: Pattern, extra: dict[str, Any]) -> float | None:
        if peer not in DENSE:
            made = _flex(q, k, v, pattern, call, direction, extra)
        else:
            if (direction, peer) in dense:
                return dense[direction, peer]
            made = _sdpa(q, k, v, DENSE[peer], direction)
        ms = _try(made, device, repeats, f"{peer} {direction}", say)
        if ms is not None and peer in DENSE:
            dense[direction, peer] = ms
        return ms

    for density in densities:
        case = _case(length, density, heads, kv_heads, width, block, dtype, device)
        pattern, measured = random_blocks(case, length)
        check_rows(f"{impl} on blocks", q, k, v, pattern, call, impl)
        pairs = pattern.pairs(call)
        for direction in directions:
            if direction == "backward":
                check_gradients(case, impl)
            ms = median_ms(_ours(q, k, v, pattern, call, direction, impl), device, repeats)
            # two products forwards, five backwards
            flop = (4 if direction == "forward" else 10) * width * pairs
            say(f"{length}, density {measured:.3f}, {direction}: {ms:.3f} ms, {flop / ms / 1e9:.0f} TFLOP/s")
            for peer in peers:
                extra: dict[str, Any] = {"pattern": "blocks", "direction": direction}
                peer_ms = against(direction, peer, pattern, extra)
                if peer_ms is not None:
                    peer_flop = flop if peer == "flex" else flop / pairs * Full().pairs(call)
                    extra |= _rates(flop, ms, peer_flop, peer_ms, limits)
                    found.append(row(impl, peer, device, dtype, length, measured, ms, peer_ms, **extra))
    if slash:
        found += _slash_rows(length, dtype, device, repeats, impl, peers, heads, kv_heads, width, limits, dense, say)
    return found


def _slash_rows(
    length: int, dtype: torch.dtype, device: str, repeats: int, impl: str, peers: Sequence[str], heads: int,
    kv_heads: int, width: int, limits: Ceiling, dense: dict[tuple[str, str], float], say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Columns and diagonals: the selection's time is part of the time."""
    q, k, v = clustered(length, heads, kv_heads, width, dtype, device)
    call = Call.of(q, k)
    method = MInference(columns=COLUMNS, diagonals=DIAGONALS)
    pattern = method.select(q, k, call)
    check_rows(f"{impl} on columns and diagonals", q, k, v, pattern, call, impl)

    def whole() -> None:
        attend(q, k, v, method.select(q, k, call), call, lse=False, impl=impl)  # type: ignore[arg-type]

    with torch.no_grad():
        ms = median_ms(whole, device, repeats)
        select_ms = median_ms(lambda: method.select(q, k, call), device, repeats)
    pairs, all_pairs = pattern.pairs(call), Full().pairs(call)
    say(f"{length}, columns and diagonals, density {pairs / all_pairs:.3f}: {ms:.3f} ms, selection {select_ms:.3f} ms")
    found = []
    for peer in peers:
        if peer not in DENSE:
            continue
        peer_ms = dense.get(("forward", peer))
        if peer_ms is None:
            peer_ms = _try(_sdpa(q, k, v, DENSE[peer], "forward"), device, repeats, peer, say)
        if peer_ms is not None:
            extra = {"pattern": "columns and diagonals", "direction": "forward", "select_ms": select_ms}
            extra |= _rates(4 * width * pairs, ms, 4 * width * all_pairs, peer_ms, limits)
            found.append(row(impl, peer, device, dtype, length, pairs / all_pairs, ms, peer_ms, **extra))
    return found


def clustered(
    length: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose scores are largest on diagonals that come in clusters, as in heads that look back a fixed way.

    Keys are waves of their position, at random frequencies; a query is the sum of what keys at a few offsets look like.
    Their product falls off as a bell around these offsets. Every head looks at its neighbourhood and at offsets of its
    own.
    """
    rng = torch.Generator(device).manual_seed(seed)
    half = width // 2
    rate = torch.randn(half, generator=rng, device=device) / SPREAD
    at = torch.arange(length, device=device, dtype=torch.float32)
    phase = at[:, None] * rate
    back = torch.rand(heads, CLUSTERS, generator=rng, device=device).pow(2) * length
    back[:, 0] = 0
    size = math.sqrt(PEAK * math.sqrt(width) / half)
    k = torch.cat((phase.cos(), phase.sin()), 1) * size
    q = torch.zeros(1, heads, length, width, dtype=dtype, device=device)
    for head in range(heads):
        waves = [(at - offset)[:, None] * rate for offset in back[head]]
        q[0, head] = (sum(torch.cat((w.cos(), w.sin()), 1) for w in waves) * size).to(dtype)
    v = torch.randn(1, kv_heads, length, width, generator=rng, device=device).to(dtype)
    return q, k.to(dtype).expand(1, kv_heads, -1, -1).contiguous(), v


def check_rows(
    what: str, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, impl: str, count: int = ROWS
) -> tuple[float, float]:
    """The gate on some rows of all heads: ours, and SDPA in the same dtype under the same mask, against float64.

    Raises:
        SaccadeError: ours is more than twice as far off.
    """
    with torch.no_grad():
        out = attend(q, k, v, pattern, call, lse=False, impl=impl).o  # type: ignore[arg-type]
        N = q.shape[2]
        rng = torch.Generator().manual_seed(N)
        rows = torch.cat((torch.tensor([0, N - 1]), torch.randint(N, (count,), generator=rng))).unique().to(q.device)
        mask = pattern.mask(call, rows)
        share = q.shape[1] // k.shape[1]
        truths, plains = [], []
        # a key head at a time: float64 scores of all heads at once would not fit at long lengths
        for g in range(k.shape[1]):
            mine = q[:, g * share : (g + 1) * share, rows]
            seen = mask[:, g * share : (g + 1) * share]
            keys, values = (t[:, g : g + 1].expand(-1, share, -1, -1) for t in (k, v))
            plains.append(scaled_dot_product_attention(mine, keys, values, attn_mask=seen))
            scores = mine.double() @ k[:, g : g + 1].double().transpose(-1, -2) * call.softmax_scale(q.shape[3])
            probs = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            truths.append(probs @ v[:, g : g + 1].double())
        return gate(f"{what} in {q.dtype}", out[:, :, rows], torch.cat(plains, 1), torch.cat(truths, 1))


def check_gradients(case: Case, impl: str) -> tuple[float, float]:
    """The gate on the gradients of a short sequence; three times plain PyTorch's error is the limit.

    Raises:
        SaccadeError: a gradient is further off.
    """
    length = min(case.length, GRADIENT_LENGTH)
    q, k, v = tensors(case, length, seed=1)
    pattern, _ = random_blocks(case, length, seed=1)
    call = Call.of(q, k)
    mask = pattern.mask(call)
    rng = torch.Generator(case.device).manual_seed(2)
    pull = torch.randn(q.shape, generator=rng, device=case.device).to(q.dtype)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share = case.heads // case.kv_heads
        k, v = (t.repeat_interleave(share, 1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)) * call.softmax_scale(case.width)
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v

    def gradients(run: Callable[..., Tensor], wide: bool) -> tuple[Tensor, ...]:
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(run(*leaves), leaves, pull.double() if wide else pull)

    ours = gradients(lambda *t: attend(*t, pattern, call, lse=False, impl=impl).o, wide=False)  # type: ignore[misc, arg-type]
    theirs, truth = gradients(plain, wide=False), gradients(plain, wide=True)
    found = [
        gate(f"{impl}, gradient of {name} in {q.dtype}", *parts, factor=3.0)
        for name, *parts in zip("qkv", ours, theirs, truth, strict=True)
    ]
    return max(found)


def _case(length: int, density: float, heads: int, kv_heads: int, width: int, block: int, dtype: torch.dtype,
          device: str) -> Case:  # fmt: skip
    return Case(length, density, heads, kv_heads, width, block, dtype, device, lists=heads)


def _ours(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, direction: str, impl: str
          ) -> Callable[[], Any]:  # fmt: skip
    return _direction(lambda q, k, v: attend(q, k, v, pattern, call, lse=False, impl=impl).o, q, k, v, direction)  # type: ignore[arg-type]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, direction: str) -> Callable[[], Any]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return lambda: _direction(run, q, k, v, direction)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, direction: str, extra: dict[str, Any]
) -> Callable[[], Any]:
    """FlexAttention compiled for this shape; the seconds that took go into `extra`."""

    def make() -> Callable[[], Any]:
        from torch.nn.attention.flex_attention import flex_attention

        assert isinstance(pattern, Blocks)
        mask = pattern.to_block_mask(call)
        compiled = torch.compile(flex_attention, dynamic=False)
        started = time.perf_counter()
        run = _direction(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True), q, k, v, direction)
        run()
        if q.is_cuda:
            torch.cuda.synchronize(q.device)
        extra["peer_compile_s"] = time.perf_counter() - started
        return run

    return make


def _direction(run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, direction: str) -> Callable[[], Any]:
    """What is timed: the call without gradients, or the gradients alone of one call."""
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return run(q, k, v)

        return forward
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = run(*leaves)
    pull = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, pull, retain_graph=True)


def _try(
    make: Callable[[], Callable[[], Any]], device: str, repeats: int, name: str, say: Callable[[str], None]
) -> float | None:
    """Milliseconds of a peer, None where it does not run here."""
    try:
        ms = median_ms(make(), device, repeats)
    except (RuntimeError, AssertionError, ImportError) as error:
        say(f"{name} does not run here: {str(error).splitlines()[0][:120] if str(error) else type(error).__name__}")
        return None
    say(f"{name}: {ms:.3f} ms")
    return ms


def _rates(flop: float, ms: float, peer_flop: float, peer_ms: float, limits: Ceiling) -> dict[str, float]:
    return {
        "tflops": flop / ms / 1e9,
        "peer_tflops": peer_flop / peer_ms / 1e9,
        "floor_ms": limits.floor_ms(flop),
        "ceiling_tflops": limits.tflops,
        "copy_tbytes": limits.tbytes,
    }
