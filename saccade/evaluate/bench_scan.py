"""The bench of linear attention: our scan beside flash-linear-attention's, on the same numbers.

flash-linear-attention (github.com/fla-org/flash-linear-attention) is used where it is installed; plain PyTorch stands
in where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.evaluate.bench_clock import LEAST, Ceiling, ceiling, gate, median_ms, row
from saccade.kernels.scan import scan

CHECKED = 1024  # tokens of the gate
KINDS = ("head", "token")


def scan_rows(
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    repeats: int = LEAST,
    *,
    impl: str = "triton",
    kinds: Sequence[str] = KINDS,
    heads: int = 32,
    width: int = 128,
    limits: Ceiling | None = None,
    done: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows forwards, and forwards and backwards, with a decay per head and with one per token.

    Args:
        length: tokens.
        dtype, device: of the tensors.
        repeats: runs of a median.
        impl: of `scan`.
        kinds: decays, of KINDS.
        heads, width: of the tensors; values are as wide as keys.
        limits: the machine's ceilings; None = measured here.
        done: called with a few words after each step.

    Raises:
        SaccadeError: the kernel is wrong; nothing is timed then.
    """
    say = done or (lambda text: None)
    limits = ceiling(device, dtype) if limits is None else limits
    found = []
    for kind in kinds:
        check(kind, dtype, device, impl, heads, width)
        q, k, v, decay = inputs(kind, length, heads, width, dtype, device)
        name, theirs = peer(q, k, v, decay)
        times: dict[str, tuple[float, float]] = {}
        for direction in ("forward", "forward+backward"):
            ours = timed(lambda q, k, v, g: scan(q, k, v, g, impl=impl)[0], (q, k, v, decay), kind, direction)  # type: ignore[arg-type]
            other = timed(theirs[0], theirs[1], kind, direction)
            times[direction] = median_ms(ours, device, repeats), median_ms(other, device, repeats)
            say(f"scan, decay per {kind}, {direction}: {times[direction][0]:.3f} ms, {name} {times[direction][1]:.3f}")
        # q, k, v in and o out; backwards q, k, v and o's gradient in and three gradients out
        for direction, tensors in (("forward", 4), ("forward+backward", 11)):
            ms, peer_ms = times[direction]
            floor = limits.floor_ms(bytes=tensors * q.numel() * q.element_size())
            extra = {"decay": kind, "direction": direction, "floor_ms": floor, "copy_tbytes": limits.tbytes}
            found.append(row(impl, name, device, dtype, length, 1.0, ms, peer_ms, **extra))
    return found


def inputs(
    kind: str, length: int, heads: int, width: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [1,H,N,D] and log decays: lightning attention's slopes [H], or random gates [1,H,N]."""
    rng = torch.Generator(device).manual_seed(seed)
    q, k, v = (
        torch.randn(1, heads, length, width, generator=rng, device=device).mul_(width**-0.5).to(dtype) for _ in range(3)
    )
    slopes = -(2.0 ** (-8 * torch.arange(1, heads + 1, device=device) / heads))
    if kind == "head":
        return q, k, v, slopes
    gates = torch.nn.functional.logsigmoid(torch.randn(1, heads, length, generator=rng, device=device) + 3)
    return q, k, v, gates


def check(kind: str, dtype: torch.dtype, device: str, impl: str, heads: int, width: int) -> tuple[float, float]:
    """The gate on a short sequence, against the quadratic form in float64 and in the same dtype.

    Raises:
        SaccadeError: the kernel is more than twice as far off as plain PyTorch.
    """
    q, k, v, decay = inputs(kind, CHECKED, heads, width, dtype, device, seed=1)
    future = torch.ones(CHECKED, CHECKED, dtype=torch.bool, device=device).triu(1)

    def quadratic(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        c = (decay[None, :, None].expand(q.shape[:3]) if kind == "head" else decay).cumsum(2)
        weight = (c[..., :, None] - c[..., None, :]).masked_fill(future, float("-inf")).exp()
        return ((q @ k.transpose(-1, -2)) * weight.to(q.dtype)) @ v

    truth = quadratic(*(t.double() for t in (q, k, v, decay)))
    plain = quadratic(q, k, v, decay)
    ours = scan(q, k, v, decay, impl=impl)[0]  # type: ignore[arg-type]
    return gate(f"{impl} scan, decay per {kind}, in {dtype}", ours, plain, truth)


def peer(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> tuple[str, Any]:
    """The peer's name, and (its call, its tensors in its own layout [B,N,H,D])."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return "chunked", (lambda q, k, v, g: scan(q, k, v, g, impl="chunked")[0], (q, k, v, decay))
    mine = tuple(t.transpose(1, 2).contiguous() for t in (q, k, v))
    if decay.ndim == 1:
        return "fla", (lambda q, k, v, g: chunk_simple_gla(q, k, v, g_gamma=g, scale=1.0)[0], (*mine, decay.float()))
    gates = decay.transpose(1, 2).contiguous()
    return "fla", (lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g, scale=1.0)[0], (*mine, gates))


def timed(run: Callable[..., Tensor], tensors: tuple[Tensor, ...], kind: str, direction: str) -> Callable[[], Any]:
    """The call alone, or with the gradients of q, k, v and of gates."""
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return run(*tensors)

        return forward
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    gates = tensors[3].detach().requires_grad_(kind == "token")
    wanted = [*leaves, gates] if kind == "token" else leaves
    pull = torch.randn_like(tensors[2])

    def both() -> Any:
        return torch.autograd.grad(run(*leaves, gates), wanted, pull)

    return both
