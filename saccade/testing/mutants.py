"""Planted faults: each breaks one thing, and the contract must find it by a wrong number, not by a crash."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from saccade.cache.group import Group
from saccade.cache.store import Store
from saccade.core.call import Call
from saccade.core.pattern import Full, Pattern, Tokens, Union, Window, per_head
from saccade.kernels.attend import tiled
from saccade.kernels.merge import Out, merge
from saccade.methods import apply as apply_module
from saccade.methods.base import Output, Scorer
from saccade.methods.controls.random import Random
from saccade.methods.decode.tidal import TidalDecode
from saccade.methods.linear.lightning import LightningAttention
from saccade.methods.policy.duo import DuoAttention
from saccade.methods.select.streaming import Streaming
from saccade.methods.sparse.routing import RoutingAttention

Plant = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutant:
    """A fault and who has to find it.

    Args:
        plant: gives a context in which the fault is there.
        method: name of the instance that has it (`saccade.testing.instances`).
        checks: checks that must fail, each by an assertion.
    """

    plant: Plant
    method: str
    checks: tuple[str, ...]


def patched(owner: Any, name: str, new: Any) -> Plant:
    """A plant that replaces one attribute."""
    return lambda: mock.patch.object(owner, name, new)


def softmax_attention(see: Callable[[Tensor, Tensor], Tensor], **fault: Any) -> Plant:
    """Replace the tiled kernel by dense attention of one's own: `see(q_pos, k_pos)` says what is causal."""

    def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, bias: Tensor | None, lse: bool) -> Out:
        share = call.shape.H // call.shape.G
        if fault.get("wrong_heads"):
            k, v = (t.repeat(1, share, 1, 1) for t in (k, v))
        else:
            k, v = (t.repeat_interleave(share, 1) for t in (k, v))
        rows, slots = torch.arange(call.shape.N), torch.arange(call.shape.M)[None, None, None]
        q_pos, k_pos = call.positions()
        q_at, k_at = q_pos[:, None, :, None], per_head(k_pos, call)[:, :, None, :]
        seen = pattern.member(call, rows, slots) & see(q_at, k_at) & (q_at >= 0) & (k_at >= 0)
        scores = q @ k.transpose(-1, -2) * (1.0 if fault.get("no_scale") else call.softmax_scale(q.shape[3]))
        scores = scores.masked_fill(~seen, float("-inf"))
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        return Out(weights @ v, scores.logsumexp(-1) * fault.get("lse", 1.0))

    return patched(tiled, "attend", attend)


def _causal(q_pos: Tensor, k_pos: Tensor) -> Tensor:
    return k_pos <= q_pos


_attend = tiled.attend


def _counts_twice(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, bias: Tensor | None, lse: bool) -> Out:
    parts = pattern.parts if isinstance(pattern, Union) else (pattern,)
    return merge([_attend(q, k, v, part, call, bias, True) for part in parts])


def _last_tile_unwritten(*args: Any) -> Out:
    out = _attend(*args)
    o = out.o.clone()
    o[:, :, out.o.shape[2] // 64 * 64 :] = float("nan")
    return Out(o, out.lse)


def _keys_without_gradient(q: Tensor, k: Tensor, *rest: Any) -> Out:
    return _attend(q, k.detach(), *rest)


def _writes_into_q(q: Tensor, *rest: Any) -> Out:
    out = _attend(q, *rest)
    q *= 0.5
    return out


def _other_row(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Out:
    return _attend(q, k.flip(0), v.flip(0), *rest)


@contextlib.contextmanager
def _stale_pick() -> Iterator[None]:
    # picks outlive the step in which they were made: the first one of each shape stays
    real, kept = TidalDecode._pick, {}

    def pick(self: TidalDecode, q: Tensor, k: Tensor, budget: int, call: Call) -> Tokens:
        return kept.setdefault((call.layer, q.shape), real(self, q, k, budget, call))

    with mock.patch.object(TidalDecode, "_pick", pick):
        yield


def _first_pick_only(self: TidalDecode, q: Tensor, k: Tensor, budget: int, call: Call) -> Tokens:
    index = torch.arange(budget, dtype=torch.int32).expand(*q.shape[:3], budget)
    return Tokens(index % max(1, call.shape.N))


def _sink_of_the_chunk(self: Streaming, q: Tensor, k: Tensor, call: Call) -> Pattern:
    return Window(self.sink if call.shape.N == call.shape.M else 0, self.recent)


def _looks_ahead(self: Streaming, q: Tensor, k: Tensor, call: Call) -> Pattern:
    # how far a head looks back is read off the last key
    return Window(self.sink, self.recent + int(k[0, 0, -1, 0] > 0) + int(k[0, 0, -1, 1] > 0))


def _everything(self: Any, q: Tensor, k: Tensor, call: Call) -> Pattern:
    return Full()


def _drawn_by_lot(self: Random, call: Call) -> int:
    return int(torch.randint(2**40, (1,)))


def _keeps_the_oldest(self: DuoAttention, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | None:
    most = self.claim(call.shape.M)
    return None if most == call.shape.M else torch.arange(most)[None, None]


def _keeps_all(self: DuoAttention, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | None:
    return None


_keep = DuoAttention.keep


def _forgets_the_newest(self: DuoAttention, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | None:
    slots = _keep(self, q, k, v, call)
    return slots if slots is None else slots[..., :-1]


_append = Store.append


def _padding_is_real(self: Store, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None:
    _append(self, k, v, None)


def _pads_like_row_0(self: Store, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None:
    _append(self, k, v, valid if valid is None else valid[:1].expand_as(valid))


_crop = Store.crop


def _crop_keeps_positions(self: Store, count: int) -> None:
    seen = list(self.seen)
    _crop(self, count)
    self.seen = seen


def _crop_leaves_slots(self: Group, removed: Any, seen: Any) -> None:
    return None


_select = Group.select


def _reorders_keys_only(self: Group, index: Tensor) -> None:
    v = self.v
    _select(self, index)
    if v is not None and len(index) <= len(v):
        self.v = v[: len(index)]


_scan = LightningAttention.forward


def _forgets_its_state(self: LightningAttention, x: Tensor, state: Tensor | None = None) -> Output:
    return _scan(self, x, None)


_route = RoutingAttention.forward


def _stores_its_loss(self: RoutingAttention, x: Tensor, state: Any = None) -> Output:
    out = _route(self, x, state)
    self.last_loss = out.loss
    return out._replace(loss=None)


_apply = apply_module.apply


def _first_heads(q: Tensor, k: Tensor, v: Tensor, call: Call, methods: Any, *rest: Any) -> Tensor:
    # the heads that a plan names are taken for the first ones
    methods = [(None if heads is None else tuple(range(len(heads))), method) for heads, method in methods]
    return _apply(q, k, v, call, methods, *rest)


_kv_heads = apply_module.kv_heads


def _first_key_heads(heads: Sequence[int], share: int) -> tuple[int, ...]:
    return tuple(range(len(_kv_heads(heads, share))))


@contextlib.contextmanager
def _shared_state() -> Iterator[None]:
    # the keys of the newest prompt, whosever it was, are where every sequence finds them
    from saccade.testing import inputs

    real, kept = inputs.apply, {}

    def apply(q: Tensor, k: Tensor, v: Tensor, call: Call, *rest: Any) -> Tensor:
        if call.shape.N > 16:
            kept[call.layer] = k.clone()
        prompt = kept[call.layer]
        return real(q, torch.cat((prompt, k[:, :, prompt.shape[2] :]), 2), v, call, *rest)

    with mock.patch.object(inputs, "apply", apply):
        yield


def _plan_without_arguments(method: Any) -> tuple[str, dict[str, Any]]:
    return "streaming", {}


def _unmasked_rows(scores: Tensor, v: Tensor, lse: bool) -> Out:
    return Out(torch.softmax(scores, -1) @ v, scores.logsumexp(-1))


def _nothing_is_padding(self: Call, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    return k_pos <= q_pos


_choose = Scorer.select


def _one_block_less(self: Scorer, q: Tensor, k: Tensor, call: Call) -> Pattern:
    pattern: Any = _choose(self, q, k, call)
    return replace(pattern, index=pattern.index[..., 1:])


MUTANTS: dict[str, Mutant] = {
    "causal_off_by_one": Mutant(
        softmax_attention(lambda i, j: j <= i + 1), "streaming", ("value_causal", "reference_equals_tiled")
    ),
    "newest_token_dropped": Mutant(
        softmax_attention(lambda i, j: (j < i) | (i == 0)), "dense", ("dense_at_full_budget", "reference_equals_tiled")
    ),
    "scale_forgotten": Mutant(softmax_attention(_causal, no_scale=True), "dense", ("dense_at_full_budget", "widths")),
    "lse_in_base_2": Mutant(softmax_attention(_causal, lse=1.4427), "dense", ("reference_equals_tiled",)),
    "wrong_kv_group": Mutant(softmax_attention(_causal, wrong_heads=True), "pooled", ("gqa", "dense_at_full_budget")),
    "tile_unwritten": Mutant(
        patched(tiled, "attend", _last_tile_unwritten), "pooled", ("awkward_lengths", "query_lengths", "widths")
    ),
    "pair_counted_twice": Mutant(
        patched(tiled, "attend", _counts_twice), "minference", ("reference_equals_tiled", "dense_at_full_budget")
    ),
    "batch_rows_mixed": Mutant(patched(tiled, "attend", _other_row), "dense", ("batch_of_two",)),
    "keys_without_gradient": Mutant(patched(tiled, "attend", _keys_without_gradient), "streaming", ("gradients",)),
    "query_written_into": Mutant(patched(tiled, "attend", _writes_into_q), "dense", ("inputs_unchanged",)),
    "empty_row_is_nan": Mutant(patched(tiled, "softmax", _unmasked_rows), "streaming", ("fully_masked_rows",)),
    "empty_slot_is_a_key": Mutant(patched(Call, "sees", _nothing_is_padding), "tidal", ("fully_masked_rows",)),
    "budget_ignored": Mutant(patched(Scorer, "select", _everything), "oracle", ("within_budget",)),
    "block_lost": Mutant(patched(Scorer, "select", _one_block_less), "oracle", ("dense_at_full_budget",)),
    "window_looks_ahead": Mutant(patched(Streaming, "select", _looks_ahead), "streaming", ("strictly_causal",)),
    "chunk_without_sink": Mutant(
        patched(Streaming, "select", _sink_of_the_chunk), "streaming", ("chunked_prefill", "prefill_then_decode")
    ),
    "stale_pick": Mutant(_stale_pick, "tidal", ("prefill_then_decode",)),
    "pick_counts_in_the_call": Mutant(
        patched(TidalDecode, "_pick", _first_pick_only), "tidal", ("prefill_then_decode",)
    ),
    "state_shared": Mutant(_shared_state, "dense", ("interleaved",)),
    "unseeded": Mutant(patched(Random, "_start", _drawn_by_lot), "random", ("seeded", "batch_of_two")),
    "heads_renumbered": Mutant(
        lambda: mock.patch("saccade.testing.inputs.apply", _first_heads), "streaming", ("head_slices",)
    ),
    "key_heads_by_count": Mutant(patched(apply_module, "kv_heads", _first_key_heads), "pooled", ("head_slices",)),
    "padding_is_a_key": Mutant(patched(Store, "append", _padding_is_real), "streaming", ("padding",)),
    "padding_of_another_row": Mutant(patched(Store, "append", _pads_like_row_0), "dense", ("padding",)),
    "wrong_slots_evicted": Mutant(
        patched(DuoAttention, "keep", _keeps_the_oldest), "duo", ("prefill_then_decode", "chunked_prefill")
    ),
    "newest_slot_evicted": Mutant(
        patched(DuoAttention, "keep", _forgets_the_newest), "duo", ("prefill_then_decode", "chunked_prefill")
    ),
    "no_slots_for_a_draft": Mutant(
        lambda: mock.patch("saccade.methods.policy.duo.DRAFT", 0), "duo", ("draft_in_the_prompt",)
    ),
    "nothing_evicted": Mutant(patched(DuoAttention, "keep", _keeps_all), "duo", ("bytes_held",)),
    "crop_forgets_positions": Mutant(patched(Store, "crop", _crop_keeps_positions), "duo", ("crop_and_reorder",)),
    "crop_leaves_slots": Mutant(patched(Group, "crop", _crop_leaves_slots), "dense", ("crop_and_reorder",)),
    "values_not_reordered": Mutant(patched(Group, "select", _reorders_keys_only), "dense", ("crop_and_reorder",)),
    "arguments_lost_in_plan": Mutant(
        lambda: mock.patch("saccade.core.plan._named", _plan_without_arguments), "streaming", ("plan_round_trip",)
    ),
    "layer_forgets_its_state": Mutant(
        patched(LightningAttention, "forward", _forgets_its_state),
        "lightning",
        ("chunked_prefill", "prefill_then_decode"),
    ),
    "loss_kept_on_the_layer": Mutant(
        patched(RoutingAttention, "forward", _stores_its_loss), "routing", ("loss_is_returned",)
    ),
    "says_nothing": Mutant(patched(Streaming, "__doc__", "Looks nearby."), "streaming", ("repr_and_doc",)),
}
