"""The bench of a whole model: prefill and decode of an 8B Llama's shape, stock transformers against an attached plan.

Weights and prompt are random: what is timed does not depend on them, and what a method costs in quality is not asked
here. Beside both stands the ceiling: the model without any attention, its matrix products alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.core.errors import SaccadeError
from saccade.core.plan import Plan
from saccade.evaluate.bench_clock import row
from saccade.hf.attach import Session, attach
from saccade.kernels.here import on
from saccade.methods.apply import Seen

CHECKED = 512  # tokens of the gate
WARM = 4  # the first prompt, which compiles the kernels, is this part of the whole one
TOKENS = 24  # decoded each way; the first quarter warms up
STOCK, FLASH = "transformers-sdpa", "transformers-sdpa-flash"
SHARE = 0.1  # of the stored tokens that a decoding query reads


@dataclass(frozen=True)
class Shape:
    """A Llama's shape; the default is that of Llama 3 8B.

    Args:
        layers: of the model; with fewer than the default the rows say so.
    """

    layers: int = 32
    width: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256


def e2e_rows(
    length: int = 131072,
    density: float = 0.1,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    repeats: int = 1,
    *,
    shape: Shape | None = None,
    prefill: str = "pooled",
    decode: str = "tidal",
    tokens: int = TOKENS,
    done: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows for prefill, for decode, and for decode as a replayed graph, against transformers with sdpa, DynamicCache.

    Where torch prefers cuDNN's attention, it plans anew for every new length, and in decode every token is one; so
    decode is also compared with sdpa that is given flash attention only.

    Args:
        length: tokens of the prompt.
        density: share of the causal pairs that block-sparse prefill reads.
        dtype, device: of the model.
        repeats: prefills that a median is made of.
        shape: of the model; None = Llama 3 8B.
        prefill: "pooled" (blocks of 128 to the density) or "minference" (its published setting).
        decode: a decode method; its budget is SHARE of the stored tokens.
        tokens: decoded after each prefill.
        done: called with a few words after each step.

    Raises:
        SaccadeError: attached without a method, the model answers otherwise than before; nothing is timed then.
    """
    say = done or (lambda text: None)
    shape = shape or Shape()
    model = build(shape, length, dtype, device)
    say(f"{shape.layers} layers, {sum(p.numel() for p in model.parameters()) / 1e9:.2f}e9 weights")
    rng = torch.Generator(device).manual_seed(0)
    ids = torch.randint(shape.vocabulary, (1, length), generator=rng, device=device)
    check(model, ids[:, :CHECKED])
    plan = Plan.uniform(model, prefill=_prefill(prefill, density), decode=(decode, {"budget": SHARE}))
    stock = _measure(model, ids, repeats, tokens, None, say=say)
    say(f"transformers: {stock}")
    seen: list[Seen] = []
    ours = _measure(model, ids, repeats, tokens, plan, seen)
    say(f"attached: {ours}")
    with _without_attention(model):
        bare = _measure(model, ids, repeats, tokens, None)
        bare = bare._replace(step_ms=_bare_step(model, ids, tokens))
    say(f"without attention: {bare}")
    scaled = {"layers": shape.layers, "prefills": repeats, "method": f"{prefill}+{decode}"}
    stepped = {"graph": True, "capture_s": ours.capture_s}
    kinds = (
        ("prefill", STOCK, ours.prefill_ms, stock.prefill_ms, bare.prefill_ms, {}),
        ("decode", STOCK, ours.token_ms, stock.token_ms, bare.token_ms, {"graph": False}),
        ("decode", STOCK, ours.step_ms, stock.token_ms, bare.step_ms, stepped),
        ("decode", FLASH, ours.token_ms, stock.flash_ms, bare.token_ms, {"graph": False}),
        ("decode", FLASH, ours.step_ms, stock.flash_ms, bare.step_ms, stepped),
    )
    found = []
    for name, peer, ms, peer_ms, least, more in kinds:
        first = name == "prefill"
        read = [s.pattern.density(s.call) for s in seen if s.pattern is not None and (s.call.shape.N > 1) == first]
        extra = {"direction": name, **more, "ceiling_ms": least, "ceiling_speedup": peer_ms / least, **scaled}
        share = sum(read) / max(len(read), 1)
        found.append(row("saccade", peer, device, dtype, length, share, ms, peer_ms, **extra))
    return found


def build(shape: Shape, length: int, dtype: torch.dtype, device: str) -> Any:
    """A Llama of this shape with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=length + 4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation="sdpa",
        use_cache=True,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def check(model: Any, ids: Tensor) -> float:
    """Attached without any method, the model must answer as before: the largest difference of the last logits.

    Raises:
        SaccadeError: it differs by more than two roundings of the model's dtype allow.
    """
    with torch.inference_mode():
        want = model(ids, logits_to_keep=1).logits
        with attach(model, Plan.uniform(model)) as session:
            got = model(ids, past_key_values=session.cache(), logits_to_keep=1).logits
    error = ((got - want).abs().max() / want.abs().max()).item()
    # each layer rounds its output a few times, in another order
    allowed = 8 * torch.finfo(want.dtype).eps
    if not error <= allowed:
        raise SaccadeError(f"bench: attached, the model answers otherwise: {error:.2e} > {allowed:.2e}; nothing timed")
    return error


class Measured(NamedTuple):
    """Medians in ms: a prefill, a token from Python, with flash attention, as a replayed graph; a capture in s."""

    prefill_ms: float
    token_ms: float
    flash_ms: float = 0.0
    step_ms: float = 0.0
    capture_s: float = 0.0

    def __str__(self) -> str:
        more = (("with flash attention", self.flash_ms), ("replayed", self.step_ms))
        rest = "".join(f", {name} {ms:.2f} ms" for name, ms in more if ms)
        return f"prefill {self.prefill_ms:.0f} ms, {self.token_ms:.2f} ms a token{rest}"


def _measure(
    model: Any,
    ids: Tensor,
    repeats: int,
    tokens: int,
    plan: Plan | None,
    seen: list[Seen] | None = None,
    say: Callable[[str], None] | None = None,
) -> Measured:
    """Time a prefill and the tokens after it, then as many again: with a plan as steps, else by flash attention."""
    from transformers.cache_utils import DynamicCache

    device = ids.device
    prefills: list[float] = []
    steps: tuple[list[float], ...] = ([], [], [])
    capture_s = 0.0
    with torch.inference_mode(), _serving(model, plan, seen) as session:
        for number in range(repeats + 1):
            cache = DynamicCache(config=model.config) if session is None else session.cache(ids.shape[1])
            # the first round compiles and fills torch's memory pools
            prompt = ids[:, : -(-ids.shape[1] // WARM)] if number == 0 else ids
            if seen is not None:
                seen.clear()
            now = _clock(device)
            token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            taken = (_clock(device) - now) * 1e3

            def eager(token: Tensor, cache: Any = cache) -> Tensor:
                return model(token, past_key_values=cache, logits_to_keep=1).logits  # type: ignore[no-any-return]

            token, each = _tokens(eager, token, tokens)
            if say is not None and number == repeats:
                say(_profile(eager, token))
            if session is not None:
                now = _clock(device)
                with session.steps(cache, room=tokens) as step:
                    capture_s = _clock(device) - now
                    replayed = _tokens(step, token, tokens)[1]
                steps[2].extend(replayed if number else [])
            else:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    steps[1].extend(_tokens(eager, token, tokens)[1] if number else [])
            del cache, eager
            if number:
                prefills.append(taken)
                steps[0].extend(each)
    flash, replays = (median(taken or [0.0]) for taken in steps[1:])
    return Measured(median(prefills), median(steps[0]), flash, replays, capture_s)


def _tokens(step: Callable[[Tensor], Tensor], token: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """Decode greedily; milliseconds of each token but the first quarter, which warms up."""
    taken = []
    for _ in range(count):
        now = _clock(token.device)
        token = step(token)[:, -1:].argmax(-1)
        taken.append((_clock(token.device) - now) * 1e3)
    return token, taken[count // 4 :]


def _profile(step: Callable[[Tensor], Tensor], token: Tensor, count: int = 4) -> str:
    """Where the time of a token goes, in a line: wall time, and the kernels or operators that take longest."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if token.is_cuda else ProfilerActivity.CPU
    now = _clock(token.device)
    with profile(activities=[kind]) as profiler:
        step(token)
        wall = (_clock(token.device) - now) * 1e3
    times = [(e.self_device_time_total if token.is_cuda else e.self_cpu_time_total, e) for e in profiler.key_averages()]
    times.sort(key=lambda pair: -pair[0])
    busy = sum(us for us, _ in times) / 1e3
    most = "; ".join(f"{event.key[:60]} x{event.count} {us / 1e3:.2f} ms" for us, event in times[:count])
    return f"a token: {wall:.1f} ms with the profiler, {busy:.1f} ms of kernels: {most}"


def _bare_step(model: Any, ids: Tensor, tokens: int) -> float:
    """A token without attention or cache, as a replayed graph on a GPU: the weights are read once."""
    token = ids[:, :1].clone()
    if not ids.is_cuda:
        return median(_tokens(lambda token: model(token).logits, token, tokens)[1])
    with torch.inference_mode(), on(ids.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(token)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            logits = model(token).logits

        def replay(_: Tensor) -> Tensor:
            graph.replay()
            return logits  # type: ignore[no-any-return]

        return median(_tokens(replay, token, tokens)[1])


@contextmanager
def _serving(model: Any, plan: Plan | None, seen: list[Seen] | None) -> Iterator[Session | None]:
    """A plan at work, or None for transformers as it is."""
    if plan is None:
        yield None
        return
    with attach(model, plan) as session:

        def watch(what: Seen) -> None:
            # keys and values are let go; a few calls of each phase say what was read
            if seen is not None and len(seen) < 2 * plan.model.layers:
                none = what.q[:, :, :0]
                seen.append(replace(what, q=none, k=none, v=none))

        session.watch = watch
        yield session


@contextmanager
def _without_attention(model: Any) -> Iterator[None]:
    """The model with attention answered by the newest values: what remains is matrix products, and no cache."""
    from transformers import AttentionInterface

    def newest(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        H, N = query.shape[1:3]
        own = value[:, :, -N:].repeat_interleave(H // value.shape[1], 1)
        return own.transpose(1, 2), None

    AttentionInterface.register("bench_without_attention", newest)
    before = model.config._attn_implementation
    forward = model.forward

    def cacheless(ids: Tensor, past_key_values: Any = None, logits_to_keep: int = 1) -> Any:
        return forward(ids, use_cache=False, logits_to_keep=logits_to_keep)

    model.set_attn_implementation("bench_without_attention")
    model.forward = cacheless
    try:
        yield
    finally:
        del model.forward
        model.set_attn_implementation(before)


def _prefill(name: str, density: float) -> tuple[str, dict[str, Any]]:
    """A prefill method with arguments for a density of the causal pairs."""
    if name == "minference":
        return name, {}
    # a row of N reads the smaller of its own length and b * N: b (2 - b) of the causal pairs
    return name, {"budget": 1 - (1 - density) ** 0.5, "block_q": 128, "block_k": 128}


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
