"""Decoding over a million tokens that lie in host memory: `fetch` and `retrieval` beside `offload`, against dense.

    PYTORCH_CUDA_ALLOC_CONF=pinned_use_cuda_host_register:True,pinned_num_register_threads:8 \\
        python bench/far.py --json bench/results/far-h200.json

Each layer is a store of a Llama-8B layer's shape (32 query and 8 key heads of width 128, bf16). It is filled as a
prompt that is read in chunks fills it: the policy moves every chunk out before the next one comes, so that the whole of
it is never on the device. Then tokens are decoded one at a time through all layers in turn, new keys and all. Of a
model only attention is run; "32 layers" is a layer's time times 32, the model's matrix products come on top.

The budget on the device is for a model of 32 layers; `--layers` of them take their part of it. Everything that PyTorch
has allocated counts, save the queries and new keys that were drawn before.

Keys are made up: stretches of 512 tokens share a direction, and 32 single keys of each head are heavy for every query.
A key head's queries look for 6 stretches at a time (48 blocks of 64), and in each step one of them is given up for
another with probability `--move`. How much of what is read was there already depends on that: 0 would be the best case,
and `--move 6` (all six, every step) the worst; both kinds of walk are measured. The mass that a method keeps is counted
against dense attention over the same keys.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.cache.cap import KEY, Cap
from saccade.cache.far import Far
from saccade.cache.store import Store, call_for
from saccade.core.call import Call
from saccade.kernels.attend import attend
from saccade.methods.apply import apply, overheard
from saccade.methods.base import Attention
from saccade.methods.decode.fetch import FetchBlocks
from saccade.methods.decode.retrieval import RetrievalAttention
from saccade.methods.policy.offload import Offload

MODEL = 32  # layers of the model whose budget is divided
STRETCH, FOCUS, HEAVY = 512, 6, 32
QUERIES = 4  # of each layer that are compared with dense attention
SPARE = 16 << 20  # bytes of each layer's part of the budget for the store's ends, scratch and results


class Size(NamedTuple):
    """Query heads, key heads, width."""

    H: int
    G: int
    D: int


class Text:
    """Keys, values and queries of one layer, drawn as they are needed."""

    def __init__(self, size: Size, length: int, seed: int, device: str, dtype: torch.dtype) -> None:
        self.size, self.length, self.device, self.dtype = size, length, device, dtype
        self.rng = torch.Generator(device).manual_seed(seed)
        G, D = size.G, size.D
        self.topics = self.draw(G, -(-length // STRETCH), D)
        self.heavy = self.draw(G, 1, D)
        self.at = torch.randint(0, length, (G, HEAVY), generator=self.rng, device=device)
        self.focus = torch.randint(0, self.topics.shape[1], (G, FOCUS), generator=self.rng, device=device)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device)

    def keys(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens a to b [1,G,b-a,D]."""
        G, D = self.size.G, self.size.D
        stretch = torch.arange(a, b, device=self.device).div(STRETCH, rounding_mode="floor")
        k = 0.7 * self.topics[:, stretch.clamp(max=self.topics.shape[1] - 1)] + 0.7 * self.draw(G, b - a, D)
        for g in range(G):
            here = self.at[g][(self.at[g] >= a) & (self.at[g] < b)] - a
            k[g, here] += 1.2 * self.heavy[g]
        return k.to(self.dtype)[None], self.draw(1, G, b - a, D).to(self.dtype)

    def query(self, move: float) -> Tensor:
        """The next query [1,H,1,D]: of a head's stretches some are left for others, `move` of them on average."""
        H, G, D = self.size
        chance = torch.rand(G, FOCUS, generator=self.rng, device=self.device) < move / FOCUS
        other = torch.randint(0, self.topics.shape[1], (G, FOCUS), generator=self.rng, device=self.device)
        self.focus = torch.where(chance, other, self.focus)
        looked = self.topics.gather(1, self.focus[..., None].expand(-1, -1, D)).sum(1)
        q = 1.2 * looked + 0.8 * self.heavy[:, 0] + 0.2 * self.draw(H // G, G, D)
        return q.transpose(0, 1).reshape(1, H, 1, D).to(self.dtype)


class Layer:
    """A store whose keys lie far, and what made them."""

    def __init__(self, text: Text, policy: Offload, cap: Cap) -> None:
        self.text = text
        G = text.size.G
        self.policy = policy
        self.store = Store([(range(G), policy)], G, {KEY: cap})

    def fill(self, chunk: int, methods: list[Attention], asked: int = 64) -> None:
        """Read a prompt: chunks come, the methods hear what was asked, the policy moves the tokens out."""
        text = self.text
        for a in range(0, text.length, chunk):
            k, v = text.keys(a, min(a + chunk, text.length))
            q = torch.cat([text.query(1.0) for _ in range(asked)], 2)
            self.store.append(k, v)
            view = self.store.views()[0]
            call = self.call(q)
            for method in methods:
                overheard(q, view.k, call, [(None, method)])
            self.store.asked([q], now=True)

    def call(self, q: Tensor) -> Call:
        store, H = self.store, self.text.size.H
        return call_for(q, store.views()[0], store.seen[0], tuple(range(H)), memory=store.memory_of(slice(0, 1)))

    def far(self) -> Far:
        return next(held for held in self.store.memory[0].values() if isinstance(held, Far))

    def step(self, q: Tensor, k: Tensor, v: Tensor, method: Attention | None) -> Tensor:
        """Decode a token: what a model's layer does beside its matrix products."""
        self.store.append(k, v)
        view = self.store.views()[0]
        o = apply(q, view.k, view.v, self.call(q), [] if method is None else [(None, method)], self.policy)
        self.store.asked([q], now=False)
        return o


def main() -> None:
    """Fill, decode, compare, print; with --json write everything."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    given.add_argument("--length", type=int, default=1 << 20)
    given.add_argument("--layers", type=int, default=12)
    given.add_argument("--steps", type=int, default=32)
    given.add_argument("--budget", type=float, default=8.0, help="GiB on the device for a model of 32 layers")
    given.add_argument("--block", type=int, default=64)
    given.add_argument("--blocks", type=int, nargs="*", default=[64, 256], help="far blocks that a query reads")
    given.add_argument("--chunk", type=int, default=16384, help="tokens of the prompt that are read at a time")
    given.add_argument("--move", type=float, nargs="*", default=[0.5, 6.0], help="stretches given up in a step")
    given.add_argument("--kinds", nargs="*", default=["lists"], help="indices of retrieval; none = leave it out")
    given.add_argument("--searched", type=int, default=2, help="layers that retrieval is measured in")
    given.add_argument("--folder", help="mapped files there instead of host memory")
    given.add_argument("--seconds", type=float, default=100.0, help="no new part is begun after so long")
    given.add_argument("--json", metavar="FILE", type=Path)
    args = given.parse_args()
    began = time.perf_counter()
    size = Size(32, 8, 128) if args.device == "cuda" else Size(4, 2, 32)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rows: list[dict[str, Any]] = []

    def say(**row: Any) -> None:
        row = {"at_s": round(time.perf_counter() - began, 1), **row}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    def late() -> bool:
        return time.perf_counter() - began > args.seconds

    base = allocated(args.device)
    part = int(args.budget * 2**30) * args.layers // MODEL
    bounds = (args.length // args.block + 64) * size.G * 2 * size.D * dtype.itemsize
    cached = part - args.layers * (bounds + SPARE)
    if cached < 1:
        given.error(
            f"a budget of {args.budget} GiB leaves nothing for blocks: bounds alone take {bounds * MODEL} bytes"
        )
    policy = Offload(128, 512, args.block, cached, args.folder, expect=args.length)
    fetches = {f"fetch, {n} blocks": FetchBlocks(n) for n in args.blocks}
    searches = {
        f"retrieval, {kind}": RetrievalAttention(budget=128 + 512 + 100, kind=kind, refresh=1 << 20)
        for kind in args.kinds
    }
    layers, cap = [], Cap()
    for number in range(args.layers):
        layer = Layer(Text(size, args.length, number, args.device, dtype), policy, cap)
        t = time.perf_counter()
        layer.fill(args.chunk, [*fetches.values(), *searches.values()])
        sync(args.device)
        layers.append(layer)
        far = layer.far().tier
        say(
            what="filled", layer=number, s=round(time.perf_counter() - t, 2), far_bytes=far.far_bytes(),
            far_tokens=far.tokens, peak_bytes=peak(args.device) - base,
        )  # fmt: skip
        if late():
            break
    L = len(layers)
    part = int(args.budget * 2**30) * L // MODEL
    say(what="all filled", layers=L, host_bytes=sum(layer.far().tier.far_bytes() for layer in layers))

    def tried(what: str, do: Callable[[], dict[str, Any]], **about: Any) -> None:
        if late():
            say(what=what, **about, left_out="no time")
            return
        try:
            say(**do())
        except Exception as error:
            say(what=what, **about, error=repr(error)[:500])

    one = layers[:2]
    for name, method in fetches.items():
        for move in args.move:
            tried(name, partial(measured, name, method, layers, move, args.steps, part, args.device), move=move)
    # everything over the bus, for every token
    exact = RetrievalAttention(budget=128 + 512 + 100, kind="flat")
    for name, method in ({"dense over host memory": None} | fetches | {"exact search": exact}).items():
        tried(name, partial(against_dense, name, method, one, args.device))
    for length in sorted({min(131072, args.length), args.length}):
        tried("dense on the device", partial(on_device, size, length, args.device, dtype), length=length)
    some = layers[: args.searched]
    for name, method in searches.items():
        tried(f"{name}: index", partial(built, name, method, some, args.device, began + args.seconds))
        for move in args.move:
            tried(name, partial(measured, name, method, some, move, args.steps, part, args.device), move=move)
        tried(name, partial(against_dense, name, method, one, args.device))
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    about = {
        "command": " ".join(["python", "bench/far.py", *sys.argv[1:]]), "machine": machine, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        "length": args.length, "layers": L, "heads": list(size),
        "dtype": str(dtype).removeprefix("torch."), "block": args.block, "blocks": args.blocks,
        "budget_bytes_model": int(args.budget * 2**30), "budget_bytes_here": part, "cache_bytes": cached,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        if "ms_layer" in row:
            rate = row.get("tokens_per_s_32_layers_extrapolated", "-")
            print(f"{row['what']:32} {row['ms_layer']:9.3f} ms a layer, {rate} tokens/s for 32 layers (extrapolated)")


def measured(
    name: str, method: Attention, layers: list[Layer], move: float, steps: int, part: int, device: str
) -> dict[str, Any]:
    """Decode `steps` tokens through all layers, after as many that fill the cache."""
    drawn = [[(layer.text.query(move), *layer.text.keys(0, 1)) for layer in layers] for _ in range(2 * steps)]
    held = sum(t.numel() * t.element_size() for step in drawn for triple in step for t in triple)
    texts = sum(text_bytes(layer.text) for layer in layers)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    t = time.perf_counter()
    for step in drawn[:steps]:
        for layer, (q, k, v) in zip(layers, step, strict=True):
            layer.step(q, k, v, method)
    sync(device)
    first = time.perf_counter() - t
    before = [counted(layer) for layer in layers]
    for step in drawn[steps:]:
        t = time.perf_counter()
        for layer, (q, k, v) in zip(layers, step, strict=True):
            layer.step(q, k, v, method)
        sync(device)
        times.append(time.perf_counter() - t)
    after = [counted(layer) for layer in layers]
    hits, misses, moved = (sum(b[i] - a[i] for a, b in zip(before, after, strict=True)) for i in range(3))
    for layer in layers:
        layer.far().tier.check()
    ms = median(times) * 1e3 / len(layers)
    whole = peak(device) - held - texts if device == "cuda" else None
    return {
        "what": name, "move": move, "layers": len(layers), "ms_layer": round(ms, 4),
        "ms_layer_worst": round(max(times) * 1e3 / len(layers), 4),
        "tokens_per_s_layer": round(1e3 / ms, 1), "tokens_per_s_32_layers_extrapolated": round(1e3 / ms / MODEL, 2),
        "hit_rate": round(hits / max(1, hits + misses), 4), "bus_bytes_step_layer": moved // steps // len(layers),
        "device_bytes": whole, "budget_bytes": part, "within": None if whole is None else whole <= part,
        "first_steps_s": round(first, 2), "steps": steps,
    }  # fmt: skip


def built(name: str, method: Attention, layers: list[Layer], device: str, until: float) -> dict[str, Any]:
    """Begin the indices of all layers, and decode on until they are there: everything is read meanwhile."""
    began, waits = time.perf_counter(), []
    while time.perf_counter() < until:
        t = time.perf_counter()
        for layer in layers:
            layer.step(layer.text.query(1.0), *layer.text.keys(0, 1), method)
        sync(device)
        waits.append((time.perf_counter() - t) * 1e3 / len(layers))
        held = [next(m for n, m in layer.store.memory[0].items() if n.startswith("retrieval")) for layer in layers]
        if getattr(method, "kind", "flat") == "flat" or all(m.get("index") is not None for m in held):
            break
    return {
        "what": f"{name}: index", "layers": len(layers), "s": round(time.perf_counter() - began, 2),
        "steps_meanwhile": len(waits), "ms_layer_step_meanwhile": round(median(waits), 2),
        "ready": [m.get("index") is not None for m in held],
        "index_bytes": sum(m["index"].bytes() for m in held if m.get("index") is not None),
    }  # fmt: skip


def against_dense(name: str, method: Attention | None, layers: list[Layer], device: str) -> dict[str, Any]:
    """Some queries in each layer: time, mass kept and error of the output against dense attention over all keys."""
    times, kept, error = [], [], []
    for layer in layers:
        for _ in range(QUERIES):
            q, view = layer.text.query(1.0), layer.store.views()[0]
            sync(device)
            t = time.perf_counter()
            dense = layer.policy.attend(q, view.k, view.v, layer.call(q))
            sync(device)
            times.append(time.perf_counter() - t)
            if method is not None:
                out = method.attend(q, view.k, view.v, layer.call(q))
                assert out.lse is not None and dense.lse is not None
                kept.append((out.lse - dense.lse).exp())
                error.append(((out.o - dense.o).float().norm(dim=-1) / dense.o.float().norm(dim=-1)).flatten())
    if method is None:
        ms, far = median(times) * 1e3, layers[0].far().tier
        moved = far.tokens * layers[0].text.size.G * 2 * layers[0].text.size.D * view.k.element_size()
        return {
            "what": name, "ms_layer": round(ms, 3), "tokens_per_s_32_layers_extrapolated": round(1e3 / ms / MODEL, 3),
            "bus_bytes_step_layer": moved, "gb_per_s": round(moved / ms / 1e6, 1),
        }  # fmt: skip
    mass, errors = torch.cat(kept).flatten(), torch.cat(error)
    return {
        "what": f"{name}, against dense", "answers": len(mass), "mass_kept_mean": round(float(mass.mean()), 4),
        "mass_kept_low": round(float(mass.quantile(0.05)), 4), "output_error": round(float(errors.mean()), 4),
    }  # fmt: skip


def on_device(size: Size, length: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Dense attention to one layer that lies on the device."""
    H, G, D = size
    q = torch.randn(1, H, 1, D, device=device, dtype=dtype)
    k, v = (torch.randn(1, G, length, D, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        sync(device)
        t = time.perf_counter()
        attend(q, k, v, lse=False)
        sync(device)
        times.append(time.perf_counter() - t)
    return {
        "what": "dense on the device", "length": length, "ms_layer": round(median(times[2:]) * 1e3, 4),
        "bytes_32_layers": 2 * k.numel() * k.element_size() * MODEL,
    }  # fmt: skip


def counted(layer: Layer) -> tuple[int, int, int]:
    counters = layer.far().tier.counters
    return counters.hits, counters.misses, counters.moved + counters.swept + counters.single


def text_bytes(text: Text) -> int:
    return sum(t.numel() * t.element_size() for t in vars(text).values() if isinstance(t, Tensor))


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


if __name__ == "__main__":
    main()
