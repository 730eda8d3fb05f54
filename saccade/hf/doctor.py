"""doctor: is the plan really at work on this model, and what does it do? Proof by running it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicCache

import saccade
from saccade.core.errors import InputError
from saccade.core.machine import cpus
from saccade.core.plan import Plan
from saccade.hf.attach import Session, attach
from saccade.hf.cache import cache_bytes
from saccade.hf.meter import Meter
from saccade.methods.apply import ASIDE, PACKED, Seen, phase_of
from saccade.methods.later import later_prompts, ranges

DENSE = 0.995  # of all pairs; a layer above that is called dense
LATER = 2 * PACKED  # tokens of the probe's second prompt
TILED = "plain PyTorch, because Triton's kernels refuse:"
WAYS = {
    "own mask": "{calls} calls in layers {layers} came with a mask of their own and went to dense sdpa, past the plan: "
    "leave the mask to transformers (attention_mask [batch, tokens])",
    "other cache": "{calls} calls in layers {layers} used another cache than session.cache(): DynamicCache copies all "
    "that it holds for every token ({bytes} bytes after the probe); pass past_key_values=session.cache()",
    "no cache": "{calls} calls in layers {layers} came without a cache: each reads all tokens again; pass "
    "past_key_values=session.cache()",
}


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found. `problems` is empty when all is well; `slow` says what costs time, `advice` what would help.

    Attributes:
        model: class and size.
        served, left_alone: layers the plan serves, and layers that keep their own attention.
        calls: attention calls per served layer in one prefill and three steps (4 each when all is well).
        prefill_density, decode_density: measured, selection included.
        padded_difference: largest difference of a left-padded row's logits from the same row alone.
        dense_difference: largest difference of the last logits from the model's own attention (what the plan changes).
        bytes_held, bytes_dense: key-value bytes of the plan's cache and of transformers' own, same tokens.
        versions: of what matters here.
        dense: layers that read everything in a phase, "prefill" and "decode".
        kernels: what computes attention, by phase: Triton's kernels, or plain PyTorch and why.
        ways: how attention calls were served, and how many (see `Session.ways`).
        later: prefill methods that cannot read what a policy leaves, so that the policy serves later prompts, dense
            over what it keeps: {"method", "policy", "layers", "heads" (a list for each layer), "seen" (layers where the
            probe's second prompt, of 32 tokens, was served so; none where nothing had been dropped), "text"}.
        threads, cpus: that torch uses, and that this process may use.
        slow: what costs time and why, a sentence each.
    """

    model: str
    served: list[int]
    left_alone: list[int]
    calls: list[int]
    prefill_density: float | None
    decode_density: float | None
    padded_difference: float
    dense_difference: float
    bytes_held: int
    bytes_dense: int
    length: int
    versions: dict[str, str]
    problems: list[str]
    advice: list[str]
    dense: dict[str, list[int]] = field(default_factory=dict)
    kernels: dict[str, list[str]] = field(default_factory=dict)
    ways: dict[str, int] = field(default_factory=dict)
    threads: int = 0
    cpus: int = 0
    slow: list[str] = field(default_factory=list)
    later: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)

    def text(self) -> str:
        """As lines for a person."""

        def share(value: float | None) -> str:
            return "none" if value is None else f"{value:.3f}"

        lines = [
            f"model             {self.model}",
            f"layers served     {ranges(self.served)}"
            + (f"; left alone (not plain causal attention): {ranges(self.left_alone)}" if self.left_alone else ""),
            f"calls per layer   {sorted(set(self.calls))} in one prefill of {self.length} tokens and three steps",
            f"density           prefill {share(self.prefill_density)}, decode {share(self.decode_density)} of dense",
            f"padded rows       differ by {self.padded_difference:.1e} from the same rows alone",
            f"plan changes      the last logits by {self.dense_difference:.1e} at most",
            f"key-value bytes   {self.bytes_held:,} held, {self.bytes_dense:,} in transformers' own cache",
            "computed by       "
            + "; ".join(f"{phase}: {', '.join(words)}" for phase, words in self.kernels.items() if words),
            f"threads           {self.threads} of {self.cpus} CPUs",
            "versions          " + ", ".join(f"{k} {v}" for k, v in self.versions.items()),
        ]
        for entry in self.later:
            seen = (
                f"so it was in layers {ranges(entry['seen'])}" if entry["seen"] else "nothing was dropped in the probe"
            )
            lines.insert(-2, f"later prompts     {entry['text']} ({seen})")
        lines += [f"problem: {line}" for line in self.problems] or ["no problems found"]
        lines += [f"slow: {line}" for line in self.slow]
        lines += [f"advice: {line}" for line in self.advice]
        return "\n".join(lines)


@dataclass
class Kernels:
    """Notes what computes each attention call: `session.watch`. Words of a refusal are the kernels' own."""

    found: dict[str, dict[str, set[int]]] = field(default_factory=dict)

    def __call__(self, seen: Seen) -> None:
        """Take note of one attend."""
        layers = self.found.setdefault(phase_of(seen.call.shape.N, seen.call.offset), {})
        layers.setdefault(computed_by(seen), set()).add(seen.call.layer)

    def said(self) -> dict[str, list[str]]:
        """By phase: what computes, and in which layers where it is not the same in all."""
        return {
            phase: [how if len(ways) == 1 else f"{how} in layers {ranges(sorted(at))}" for how, at in ways.items()]
            for phase, ways in self.found.items()
        }


def computed_by(seen: Seen) -> str:
    """What computes an attention call, in words."""
    if seen.pattern is None:
        return f"{' and '.join(seen.methods) or 'a policy'}, by itself"
    if not on_gpu(seen.q):
        return "plain PyTorch, the CPU's own path"
    try:
        from saccade.kernels.attend import triton
    except ImportError:
        return f"{TILED} Triton is not installed"
    refused = triton.refuses(seen.q, seen.k, seen.v, seen.pattern, seen.call, seen.bias)
    return "Triton" if refused is None else f"{TILED} {refused}"


def on_gpu(q: torch.Tensor) -> bool:
    """Would "auto" try Triton's kernels for this tensor?"""
    return q.is_cuda


def doctor(
    model: torch.nn.Module, plan: Plan, length: int = 512, run: Callable[[Session], Any] | None = None
) -> Diagnosis:
    """Attach a plan to a model, run a prefill and three steps, and say what really happened.

    Args:
        model: a Hugging Face causal language model.
        plan: the plan to look at.
        length: tokens of the probe (random ids).
        run: your own use of the model, given the session: what it does that costs time is found too.

    Returns:
        A Diagnosis; the model is left as it was.

    Raises:
        InputError: a probe of one token.
        PlanError, UnsupportedError: as `attach`.
    """
    if length < 2:
        raise InputError(
            f"doctor: the probe's length must be >= 2 tokens, got {length}: one of its rows is padded, and has fewer; "
            "512 is usual"
        )
    device = next(model.parameters()).device
    config = model.config.get_text_config()
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (1, length), generator=rng).to(device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            dense_cache = DynamicCache(config=config)
            dense = model(ids, past_key_values=dense_cache, logits_to_keep=1).logits
            with attach(model, plan) as session:
                meter, kernels = Meter(mass=False), Kernels()

                def watch(seen: Seen) -> None:
                    meter(seen)
                    kernels(seen)

                session.watch = watch
                cache = session.cache(length)
                logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
                for _ in range(3):
                    model(ids[:, -1:], past_key_values=cache)
                calls = [session.calls[layer] for layer in session.served()]
                session.watch = None
                padded = _padded(model, session, ids)
                if run is not None:
                    run(session)
                served, rest = session.served(), sorted(set(session.modules) - set(session.served()))
                held = cache.bytes()
                later = _later(model, session, cache, ids)
    finally:
        model.train(was_training)
    bytes_dense = sum(cache_bytes(layer) for layer in dense_cache.layers)
    found = Diagnosis(
        model=f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
        f"{next(model.parameters()).dtype}, {device}",
        served=served,
        left_alone=rest,
        calls=calls,
        prefill_density=meter.density("prefill"),
        decode_density=meter.density("decode"),
        padded_difference=padded,
        dense_difference=float((dense - logits).abs().max()),
        bytes_held=held,
        bytes_dense=bytes_dense,
        length=length,
        versions={
            "saccade": saccade.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        problems=[],
        advice=[],
        dense={phase: _dense(meter, phase, served) for phase in ("prefill", "decode")},
        kernels=kernels.said(),
        ways={way: sum(n for (its, _), n in session.ways.items() if its == way) for way, _ in session.ways},
        threads=torch.get_num_threads(),
        cpus=cpus(),
        later=later,
    )
    found.problems.extend(_problems(found, float(logits.abs().max())))
    found.slow.extend(_slow(found, plan, session))
    found.advice.extend(_advice(found, plan))
    return found


def _padded(model: Any, session: Session, ids: torch.Tensor) -> float:
    """Logits of a left-padded row beside a longer one, against the same row alone."""
    N, pad = ids.shape[1], max(1, ids.shape[1] // 5)
    short = ids[:, pad:]
    batch = torch.cat((ids, torch.cat((ids[:, :pad] * 0, short), 1)))
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    both = model(
        batch, attention_mask=mask, position_ids=positions, past_key_values=session.cache(N), logits_to_keep=1
    ).logits[1]
    alone = model(short, past_key_values=session.cache(N), logits_to_keep=1).logits[0]
    return float((both - alone).abs().max())


def _later(model: Any, session: Session, cache: Any, ids: torch.Tensor) -> list[dict[str, Any]]:
    """Which prefill methods cannot read a second prompt over a cache that evicts, and in which layers it was so."""
    served = session.served()
    found = [
        entry._replace(heads={at: h for at, h in entry.heads.items() if at in served})
        for entry in later_prompts(session.plan)
    ]
    if not any(entry.heads for entry in found):
        return []
    before = session.ways.copy()
    model(ids[:, :1].expand(-1, LATER), past_key_values=cache, logits_to_keep=1)
    seen = [at for at in served if (session.ways - before)[ASIDE, at]]
    return [
        {
            "method": entry.method,
            "policy": entry.policy,
            "layers": list(entry.heads),
            "heads": [list(heads) for heads in entry.heads.values()],
            "seen": [at for at in seen if at in entry.heads],
            "text": entry.text(),
        }
        for entry in found
        if entry.heads
    ]


def _problems(found: Diagnosis, size: float) -> list[str]:
    problems = []
    if not found.served:
        problems.append("the plan serves no layer of this model: nothing is sparse")
    if any(count != 4 for count in found.calls):
        problems.append(f"calls per layer are {found.calls}, not 4 each: some attention does not go through the plan")
    tolerance = 1e-4 if "float32" in found.model else 5e-2
    if found.padded_difference > tolerance * max(1.0, size):
        problems.append(f"padded rows differ from rows alone by {found.padded_difference:.1e}: report this")
    return problems


def _slow(found: Diagnosis, plan: Plan, session: Session) -> list[str]:
    """What costs time, and why."""
    slow = []
    for phase, layers in found.dense.items():
        bare = [at for at in layers if not (plan.phase(at, phase) or plan.phase(at, "cache"))]
        if bare:
            slow.append(f"{phase} is dense in layers {ranges(bare)}: the plan names no method there")
        by: dict[str, list[int]] = {}
        for at in sorted({*layers} - {*bare}):
            names = dict.fromkeys(a.method for a in (*plan.phase(at, phase), *plan.phase(at, "cache")))
            by.setdefault(" and ".join(names), []).append(at)
        for names, where in by.items():
            slow.append(
                f"{phase} is dense in layers {ranges(where)}: {names} reads everything at {found.length} tokens"
            )
    for way, words in WAYS.items():
        where = sorted(at for (its, at), n in session.ways.items() if its == way and n)
        if where:
            slow.append(words.format(calls=found.ways[way], layers=ranges(where), bytes=f"{found.bytes_dense:,}"))
    for phase, ways in found.kernels.items():
        slow += [f"{phase} runs in {words}" for words in ways if words.startswith(TILED)]
    if "cpu" in found.model.rsplit(", ", 1)[-1]:
        if found.threads > found.cpus:
            slow.append(f"torch uses {found.threads} threads on {found.cpus} CPUs: they wait for each other")
        # with two threads to a core, torch's own choice is half of the CPUs
        elif found.threads < found.cpus // 2:
            slow.append(f"torch uses {found.threads} of {found.cpus} CPUs: raise it with torch.set_num_threads")
    return slow


def _dense(meter: Meter, phase: str, layers: list[int]) -> list[int]:
    """Layers whose measured density is that of dense attention."""
    found = {at: meter.density(phase, at) for at in layers}
    return [at for at, share in found.items() if share is not None and share > DENSE]


def _advice(found: Diagnosis, plan: Plan) -> list[str]:
    advice = []
    phases = {assign.phase for row in plan.layers for assign in row}
    if found.prefill_density is not None and found.prefill_density > 0.9 and "prefill" in phases:
        advice.append(f"prefill is nearly dense at {found.length} tokens; try a longer --length or a smaller budget")
    if "decode" not in phases and "cache" not in phases:
        advice.append("decoding is dense: add a decode method or a cache policy to save time per token")
    if "cache" not in phases:
        advice.append("the cache keeps everything: add a cache policy to save bytes")
    if found.left_alone:
        advice.append(f"layers {ranges(found.left_alone)} keep their sliding window or recurrent attention")
    return advice
