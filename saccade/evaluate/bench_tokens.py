"""The bench of decoding: a token of an 8B Llama's shape under several methods, against stock transformers.

Weights are random, and so are the keys and values of the text before: they are put into the caches as they are, so that
no prefill is paid for. What is timed does not depend on them, but for a search whose way does; what a method costs in
quality is not asked here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.core.plan import Assign, Plan
from saccade.evaluate.bench_clock import row
from saccade.evaluate.bench_e2e import (
    CHECKED,
    FLASH,
    STOCK,
    Shape,
    _bare_step,
    _clock,
    _tokens,
    _without_attention,
    build,
    check,
)
from saccade.evaluate.costs import read_bytes
from saccade.evaluate.presets import DENSE, preset
from saccade.hf.attach import Session, attach
from saccade.methods.apply import Seen

TOKENS = 32  # decoded from Python; the first quarter warms up
REPLAYS = 4  # as many times more are replayed, so that what comes now and then comes a few times
SINK, RECENT = 128, 256  # of duo's streaming heads: every second one, as DuoAttention's published plans have about half
FILL = "random keys and values, no prefill"


def token_rows(
    length: int,
    methods: Sequence[str],
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    *,
    shape: Shape | None = None,
    tokens: int = TOKENS,
    done: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Four rows for each method: from Python and replayed, against transformers as it is and held to flash attention.

    Where steps of a method are of several kinds (a search now and then), `ms` is the mean of the kinds' medians, each
    weighed by how often it comes; elsewhere the median.

    Args:
        length: tokens in the cache.
        methods: "dense", "duo" (every second key head streams), or decode methods with their presets for this length;
            `"quest@0.05"` reads about that share of the keys.
        dtype, device: of the model.
        shape: of the model; None = Llama 3 8B.
        tokens: decoded each way, the first quarter to warm up.
        done: called with a few words after each step.

    Raises:
        SaccadeError: attached without a method, the model answers otherwise than before; nothing is timed then.
        PlanError: a method that has no preset.
    """
    say = done or (lambda text: None)
    shape = shape or Shape()
    model = build(shape, length, dtype, device)
    plans = {name: decode_plan(name, model, length) for name in methods}
    ids = torch.randint(shape.vocabulary, (1, CHECKED), device=device)
    check(model, ids)
    text = list(made_up(shape, length, dtype, device))
    size = 2 * sum(k.numel() * k.element_size() for k, _ in text)
    say(f"{shape.layers} layers, {size / 1e9:.1f} GB of keys and values")
    with torch.inference_mode():
        peers = {STOCK: _stock(model, text, ids[:, :1], tokens)}
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            peers[FLASH] = _stock(model, text, ids[:, :1], tokens)
        with _without_attention(model):
            bare = _bare_step(model, ids, tokens)
    say(", ".join(f"{name} {ms:.2f} ms" for name, ms in peers.items()) + f", without attention {bare:.2f} ms")
    found = []
    for name, plan in plans.items():
        mine = _method(model, plan, text, ids[:, :1], tokens)
        say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in mine.items()))
        extra = {"direction": "decode", "method": name, "ceiling_ms": bare, "layers": shape.layers, "cache": FILL}
        for peer, peer_ms in peers.items():
            for graph in (False, True):
                more = {key: mine[key] for key in ("read_bytes", "state_bytes")}
                if graph:
                    more |= {key: mine[key] for key in ("capture_s", "kinds")}
                ms = mine["step_ms" if graph else "token_ms"]
                found.append(
                    row(
                        "saccade",
                        peer,
                        device,
                        dtype,
                        length,
                        mine["density"],
                        ms,
                        peer_ms,
                        graph=graph,
                        **extra,
                        **more,
                    )
                )
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    return found


def decode_plan(name: str, model: Any, length: int) -> Plan:
    """What a name in the bench stands for: its decode and cache phases only."""
    if name == DENSE:
        return Plan.uniform(model)
    plan = Plan.uniform(model)
    if name == "duo":
        some = Assign(tuple(range(0, plan.model.kv_heads, 2)), "duo", {"sink": SINK, "recent": RECENT}, phase="cache")
        return Plan.per_head(model, [[some]] * plan.model.layers)
    chosen = preset(name, model, length)
    return replace(chosen, layers=tuple(tuple(a for a in each if a.phase != "prefill") for each in chosen.layers))


def made_up(shape: Shape, length: int, dtype: torch.dtype, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Random keys and values [1,G,length,D] of each layer."""
    rng = torch.Generator(device).manual_seed(1)
    size = (1, shape.kv_heads, length, shape.width // shape.heads)
    for _ in range(shape.layers):
        k, v = (torch.randn(size, generator=rng, device=device, dtype=dtype) for _ in range(2))
        yield k, v


def filled(session: Session, text: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """A cache of the session that holds these keys and values; its policies have evicted."""
    length = text[0][0].shape[2]
    cache = session.cache(length)
    for layer, (k, v) in zip(cache.layers, text, strict=True):
        layer.store.append(k, v)
        asked = k[:, :, -CHECKED:].repeat_interleave(session.plan.model.heads // k.shape[1], 1)
        layer.store.asked([asked], now=True)
    return cache


def _stock(model: Any, text: Sequence[tuple[Tensor, Tensor]], token: Tensor, tokens: int) -> float:
    """Median milliseconds of a token in transformers with its own cache."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=model.config)
    for layer, (k, v) in enumerate(text):
        cache.update(k, v, layer)
    taken = _tokens(lambda token: model(token, past_key_values=cache, logits_to_keep=1).logits, token, tokens)[1]
    return median(taken)


def _method(
    model: Any, plan: Plan, text: Sequence[tuple[Tensor, Tensor]], token: Tensor, tokens: int
) -> dict[str, Any]:
    """Milliseconds of a token from Python and as a replayed graph, and what a step reads."""
    layers, held = len(text), text[0][0]
    with torch.inference_mode(), attach(model, plan) as session:
        cache = filled(session, text)
        bytes_read, pairs = [0.0], [0.0]

        def watch(seen: Seen) -> None:
            bytes_read[0] += read_bytes(seen)
            pairs[0] += seen.pattern.pairs(seen.call) if seen.pattern is not None else seen.estimate

        def eager(token: Tensor) -> Tensor:
            logits: Tensor = model(token, past_key_values=cache, logits_to_keep=1).logits
            return logits

        # the first tokens make what a method remembers, and compile
        for _ in range(2):
            token = eager(token).argmax(-1)
        session.watch = watch
        token = eager(token).argmax(-1)
        session.watch = None
        token, each = _tokens(eager, token, tokens)
        now = _clock(token.device)
        with session.steps(cache, room=REPLAYS * tokens) as step:
            capture_s = _clock(token.device) - now
            by_kind = defaultdict(list)
            for number in range(REPLAYS * tokens):
                now = _clock(token.device)
                token = step(token).argmax(-1)
                taken = (_clock(token.device) - now) * 1e3
                by_kind[step.kind].append((number, taken))
        # the first of a kind is captured; what comes early warms up, if there is more
        kept = [
            [ms for n, ms in pairs[1:] if n >= tokens // 4] or [ms for _, ms in pairs] for pairs in by_kind.values()
        ]
        often = [len(pairs) for pairs in by_kind.values()]
        usual = [median(ms) for ms in kept]
        return {
            "token_ms": median(each),
            "step_ms": sum(ms * n for ms, n in zip(usual, often, strict=True)) / sum(often),
            "kinds": [{"steps": n, "ms": round(ms, 4)} for ms, n in zip(usual, often, strict=True)],
            "capture_s": capture_s,
            "read_bytes": round(bytes_read[0]),
            "state_bytes": cache.state_bytes(),
            "density": pairs[0] / (layers * plan.model.heads * held.shape[2]),
        }
