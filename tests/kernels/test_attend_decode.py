"""Decoding on a GPU: the kernels, run by Triton's interpreter, equal the reference; so do groups of a store."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Blocks, Full, PerHead, Tokens, Union, Window
from saccade.kernels.attend import attend, decode_units
from saccade.kernels.attend.decode_groups import decode_groups, layout
from saccade.kernels.attend.decode_quantized import Quantized, decode_quantized, quantize

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def draw(*shape, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng).to(DEVICE, dtype)


def lists(rng, rows, heads, lines, count, high):
    """Distinct entries in no order, lines of all lengths from none to `count`."""
    found = torch.rand(rows, heads, lines, high, generator=rng).argsort(-1)[..., :count]
    found = torch.nn.functional.pad(found, (0, count - found.shape[-1]), value=-1)
    keep = torch.randint(0, count + 1, (rows, heads, lines, 1), generator=rng)
    return found.masked_fill(torch.arange(count) >= keep, -1).int().to(DEVICE)


def tensors(B, H, G, N, M, D=8, Dv=8, dtype=torch.float32, room=0, seed=0):
    """q, k, v; with room, k and v are views of a store whose room holds NaN."""
    q, k, v = (
        draw(B, H, N, D, seed=seed),
        draw(B, G, M + room, D, seed=seed + 1),
        draw(B, G, M + room, Dv, seed=seed + 2),
    )
    k[:, :, M:], v[:, :, M:] = float("nan"), float("nan")
    return q.to(dtype), k.to(dtype)[:, :, :M], v.to(dtype)[:, :, :M]


def compare(q, k, v, pattern, call=None, key_bias=None, tolerance=1e-5):
    got = attend(q, k, v, pattern, call, key_bias=key_bias, impl="triton")
    want = attend(q.double(), k.double(), v.double(), pattern, call, key_bias=key_bias, impl="reference")
    torch.testing.assert_close(got.o.double(), want.o, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.lse.double(), want.lse, atol=tolerance, rtol=tolerance)
    assert got.o.dtype == q.dtype and got.lse.dtype == torch.float32
    return got


def holes(B, G, N, M, rng):
    """Positions of an evicted store and of its queries, some not real."""
    k_pos = torch.rand(B, G, 2 * M, generator=rng).argsort(-1)[..., :M].sort(-1).values.int()
    k_pos[torch.rand(k_pos.shape, generator=rng) < 0.1] = -1
    q_pos = torch.arange(2 * M - N, 2 * M).repeat(B, 1)
    q_pos[torch.rand(q_pos.shape, generator=rng) < 0.1] = -1
    return q_pos.to(DEVICE), k_pos.to(DEVICE)


@st.composite
def leaf(draw, heads, kv, N, M, rows, rng):
    kind = draw(st.sampled_from(["full", "window", "window per head", "blocks", "tokens"]))
    if kind == "full":
        return Full()
    if kind == "window":
        return Window(draw(st.integers(0, 9)), draw(st.integers(1, 2 * M)))
    if kind == "window per head":
        sizes = torch.randint(1, M + 1, (2, heads), generator=rng).to(DEVICE)
        return Window(sizes[0], sizes[1])
    axis, batch = draw(st.sampled_from([1, kv, heads])), draw(st.sampled_from([1, rows]))
    count = draw(st.integers(1, 6))
    if kind == "tokens":
        return Tokens(lists(rng, batch, axis, draw(st.sampled_from([1, N])), count, M))
    block_q, block_k = draw(st.sampled_from([1, 2, 16])), draw(st.sampled_from([1, 5, 16, 64]))
    return Blocks(lists(rng, batch, axis, -(-N // block_q), count, -(-M // block_k)), block_q, block_k)


@st.composite
def case(draw):
    rng = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    G, share, B = draw(st.sampled_from([(1, 1, 1), (2, 2, 1), (1, 3, 2), (2, 2, 2), (2, 1, 1)]))
    H, N = G * share, draw(st.integers(1, 6))
    M = N + draw(st.integers(1, 150))
    shape = draw(st.sampled_from(["leaf", "leaf", "union", "per head", "union of both"]))

    def one(heads, kv):
        return draw(leaf(heads, kv, N, M, B, rng))

    def split():
        # the heads of the first key head, and the others backwards
        first, rest = tuple(range(share)), tuple(range(H - 1, share - 1, -1))
        kv = 1 if share == 1 else len(rest)
        return PerHead(((first, one(share, 1)), *([(rest, one(len(rest), kv))] if rest else [])))

    if shape == "leaf":
        pattern = one(H, G)
    elif shape == "union":
        pattern = Union(tuple(one(H, G) for _ in range(draw(st.integers(2, 3)))))
    elif shape == "per head":
        pattern = split()
    else:
        pattern = Union((one(H, G), split()))
    q, k, v = tensors(B, H, G, N, M, D=draw(st.sampled_from([8, 20])), Dv=draw(st.sampled_from([8, 3])), room=7)
    fields = dict(causal=draw(st.booleans()), scale=draw(st.sampled_from([None, 0.3])))
    if draw(st.booleans()):
        fields["q_pos"], fields["k_pos"] = holes(B, G, N, M, rng)
        if draw(st.booleans()):
            fields["q_pos"], fields["k_pos"] = fields["q_pos"][:1], fields["k_pos"][:1, :1]
    bias = (
        torch.randn(1, draw(st.sampled_from([1, G, H])), M, generator=rng).to(DEVICE) if draw(st.booleans()) else None
    )
    return q, k, v, pattern, Call.of(q, k, **fields), bias


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case())
def test_equals_the_reference(made):
    q, k, v, pattern, call, bias = made
    compare(q, k, v, pattern, call, bias)


@pytest.mark.parametrize("axis", [1, 2, 4])
@pytest.mark.parametrize("height, block", [(1, 16), (2, 64), (3, 5), (2, 1)])
def test_lists_for_some_of_the_queries(axis, height, block):
    q, k, v = tensors(2, 4, 2, 5, 130, room=3)
    rng = torch.Generator().manual_seed(axis)
    index = lists(rng, 2, axis, -(-5 // height), 4, -(-130 // block))
    compare(q, k, v, Blocks(index, height, block) if block > 1 else Tokens(lists(rng, 1, axis, 5, 9, 130)))


@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (4, 5, 0, 1)])
def test_lists_per_kv_head_for_some_of_the_heads(heads):
    q, k, v = tensors(1, 6, 3, 2, 90)
    index = lists(torch.Generator().manual_seed(1), 1, 2, 1, 9, 90)
    rest = tuple(h for h in range(6) if h not in heads)
    compare(q, k, v, PerHead(((heads, Tokens(index)), (rest, Window(2, 5)))))


@pytest.mark.parametrize("axis", [1, 2, 4])
def test_key_bias(axis):
    q, k, v = tensors(2, 4, 2, 2, 90)
    bias = draw(2, 90, axis, seed=5).transpose(1, 2) * 3
    some = Tokens(torch.arange(5, 60).view(1, 1, 1, 55).int().to(DEVICE))
    for pattern in (Full(), some, PerHead((((3, 1), Full()), ((0, 2), Window(3, 9))))):
        compare(q, k, v, pattern, key_bias=bias)


@pytest.mark.parametrize("programs", [1, 4, 40])
def test_any_number_of_splits(programs, monkeypatch):
    monkeypatch.setattr(decode_units, "processors", lambda device: programs)
    q, k, v = tensors(1, 2, 1, 2, 301, room=3)
    rng = torch.Generator().manual_seed(programs)
    blocks = Blocks(lists(rng, 1, 1, 1, 3, 5), 16, 64)
    for pattern in (Full(), Union((Window(5, 70), blocks)), PerHead((((0,), Full()), ((1,), Window(2, 3))))):
        compare(q, k, v, pattern)


@pytest.mark.parametrize("D, Dv", [(64, 64), (80, 96), (96, 80), (128, 256), (256, 16), (3, 5)])
def test_widths(D, Dv):
    q, k, v = tensors(1, 2, 1, 1, 70, D=D, Dv=Dv)
    compare(q, k, v, Window(3, 40))


@pytest.mark.parametrize("H, N", [(40, 2), (3, 16), (71, 1)])
def test_more_rows_than_a_unit_takes(H, N):
    q, k, v = tensors(1, H, 1, N, 40)
    compare(q, k, v, Full())
    compare(q, k, v, PerHead(((tuple(range(H - 1)), Full()), ((H - 1,), Window(2, 5)))))


def test_half_precision():
    q, k, v = tensors(1, 4, 2, 3, 200, D=64, Dv=64, dtype=torch.float16)
    compare(
        q, k, v, Union((Window(4, 60), Tokens(torch.arange(50, 90).view(1, 1, 1, 40).int().to(DEVICE)))), tolerance=2e-3
    )


def test_rows_without_keys_give_zero():
    q, k, v = tensors(1, 4, 2, 3, 40)
    empty = torch.full((1, 1, 1, 1), -1, dtype=torch.int32, device=DEVICE)
    late = torch.full((1, 1, 1, 1), 39, dtype=torch.int32, device=DEVICE)
    nothing = Call.of(q, k, q_pos=torch.full((1, 3), -1).to(DEVICE), k_pos=torch.arange(40)[None, None].to(DEVICE))
    for pattern, call, rows in [
        (Tokens(empty), None, 3),
        (Blocks(empty, 16, 64), None, 3),
        (Tokens(late), None, 2),
        (Full(), nothing, 3),
        (PerHead((((0, 1, 2), Tokens(empty)), ((3,), Blocks(empty, 16, 16)))), None, 3),
    ]:
        out = compare(q, k, v, pattern, call)
        assert not out.o[:, :, :rows].any() and out.lse[:, :, :rows].isneginf().all()


def test_keys_that_are_not_real_are_not_read():
    q, k, v = tensors(1, 4, 2, 2, 90)
    k_pos = torch.arange(90).expand(1, 2, 90).clone().int().to(DEVICE)
    k_pos[:, :, 20:60] = -1
    k[:, :, 20:60], v[:, :, 20:60] = float("nan"), float("nan")
    call = Call.of(q, k, q_pos=torch.tensor([[88, 89]], device=DEVICE), k_pos=k_pos)
    for pattern in (Full(), Window(30, 50), Tokens(torch.arange(10, 80).view(1, 1, 1, 70).int().to(DEVICE))):
        assert attend(q, k, v, pattern, call, impl="triton").o.isfinite().all()


def test_large_logits():
    q, k, v = tensors(1, 2, 1, 1, 200)
    out = attend(q * 1e3, k * 1e3, v, impl="triton")
    assert out.o.isfinite().all() and out.lse.isfinite().all()


def test_expanded_and_transposed_tensors():
    q, k, v = tensors(2, 4, 2, 2, 70)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    compare(*strided, Window(3, 20))
    compare(q, k[:1, :1].expand(2, 2, -1, -1), v[:1, :1].expand(2, 2, -1, -1), Full())


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(dtype=torch.float64), "float64"),
        (dict(D=300), "300"),
        (dict(pattern=Union(tuple(Tokens(torch.zeros(1, 1, 1, 1).int()) for _ in range(4)))), "4 index tensors"),
        (dict(channels=True), "side by side"),
        (dict(grad=True), "gradients"),
    ],
)
def test_what_is_refused_is_said(change, words):
    change = dict(change)
    pattern, channels, grad = change.pop("pattern", Full()), change.pop("channels", False), change.pop("grad", False)
    q, k, v = tensors(1, 2, 1, 1, 9, **change)
    if channels:
        k = k.transpose(2, 3).contiguous().transpose(2, 3)
    if grad:
        q.requires_grad_()
    with pytest.raises(UnsupportedError, match=words):
        attend(q, k, v, pattern, impl="triton")


def grown(share, N, spec, B=1, D=8, Dv=8, seed=0):
    """Groups of a store: (heads, k, v, pos, pattern, length of each row), tokens seen by each row."""
    groups, rng = [], torch.Generator().manual_seed(seed)
    for at, (heads, room, lengths, pattern, evicted) in enumerate(spec):
        k, v = draw(B, len(heads), room, D, seed=seed + 2 * at), draw(B, len(heads), room, Dv, seed=seed + 2 * at + 1)
        pos = None
        if evicted:
            pos = torch.full((B, len(heads), room), -1, dtype=torch.int32)
            for b, (length, seen) in enumerate(zip(lengths, evicted, strict=True)):
                for g in range(len(heads)):
                    kept = torch.randperm(seen - N, generator=rng)[: length - N].sort().values
                    pos[b, g, :length] = torch.cat((kept, torch.arange(seen - N, seen))).int()
            pos = pos.to(DEVICE)
        for b, length in enumerate(lengths):
            k[b, :, length:], v[b, :, length:] = float("nan"), float("nan")
        groups.append((heads, k, v, pos, pattern, lengths))
    return groups


def by_group(q, groups, seen, share):
    """The same, group by group and row by row, with the reference."""
    o, lse = torch.zeros(*q.shape[:3], groups[0][2].shape[3]).double(), torch.zeros(q.shape[:3]).double()
    for heads, k, v, pos, pattern, lengths in groups:
        mine = [h * share + i for h in heads for i in range(share)]
        for b, length in enumerate(lengths):
            one, keys, values = q[b : b + 1, mine], k[b : b + 1, :, :length], v[b : b + 1, :, :length]
            call = Call.of(one, keys)
            if pos is not None:
                q_pos = torch.arange(seen[b] - q.shape[2], seen[b], device=q.device)[None]
                call = Call.of(one, keys, q_pos=q_pos, k_pos=pos[b : b + 1, :, :length])
            out = attend(one.double(), keys.double(), values.double(), pattern, call, impl="reference")
            o[b, mine], lse[b, mine] = out.o[0].cpu(), out.lse[0].cpu()
    return o, lse


def told(groups, seen, kv):
    """Lengths and tokens seen, as `decode_groups` reads them."""
    table = torch.zeros(len(seen), kv, dtype=torch.int32)
    for heads, *_, lengths in groups:
        table[:, list(heads)] = torch.tensor(lengths, dtype=torch.int32)[:, None]
    return torch.cat((table.flatten(), torch.tensor(seen, dtype=torch.int32))).to(DEVICE)


GROUPS = [
    # one row, retrieval heads between streaming heads that have evicted
    (2, 1, [((1, 2), 200, [170], Full(), None), ((0, 3), 60, [40], Window(8, 20), [170])], [170]),
    # rows of different lengths, a draft, a window over a whole store, a group that evicted and sees all it has
    (
        1,
        3,
        [
            ((2,), 150, [90, 131], Full(), None),
            ((0,), 140, [90, 131], Window(3, 7), None),
            ((1,), 30, [9, 27], Full(), [90, 131]),
        ],
        [90, 131],
    ),
]


@pytest.mark.parametrize("share, N, spec, seen", GROUPS)
def test_groups_of_a_store_in_one_launch(share, N, spec, seen):
    groups = grown(share, N, spec, B=len(seen), Dv=12)
    kv = sum(len(heads) for heads, *_ in groups)
    q = draw(len(seen), kv * share, N, 8, seed=9)
    where = layout([group[:5] for group in groups], share, N)
    out = decode_groups(q, where, told(groups, seen, kv))
    o, lse = by_group(q, groups, seen, share)
    torch.testing.assert_close(out.o.double().cpu(), o, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.lse.double().cpu(), lse, atol=1e-5, rtol=1e-5)


def test_groups_go_on_being_right_while_the_store_grows():
    full, near = draw(1, 1, 64, 8, seed=1), draw(1, 1, 64, 8, seed=2)
    where = layout([((0,), full, full, None, Full()), ((1,), near, near, None, Window(2, 5))], share=2)
    lengths = torch.tensor([30, 30, 30], dtype=torch.int32, device=DEVICE)
    for step in range(3):
        q = draw(1, 4, 1, 8, seed=10 + step)
        # the store writes in place; the layout stays
        full[:, :, 30 + step], near[:, :, 30 + step] = draw(1, 1, 8, seed=20 + step), draw(1, 1, 8, seed=30 + step)
        lengths += 1
        out, at = decode_groups(q, where, lengths), 31 + step
        groups = [((0,), full, full, None, Full(), [at]), ((1,), near, near, None, Window(2, 5), [at])]
        o, _ = by_group(q, groups, [at], 2)
        torch.testing.assert_close(out.o.double().cpu(), o, atol=1e-5, rtol=1e-5)


def test_groups_that_do_not_fit():
    k, pos = draw(1, 2, 32, 8), torch.zeros(1, 2, 32, dtype=torch.int64, device=DEVICE)
    for groups in (
        [((0, 2), k, k, None, Full())],
        [((0, 1), k, k, pos, Full())],
        [((0, 1), k, k[..., :7], None, Full())],
        [((0, 1), k, k, None, Tokens(torch.zeros(1, 1, 1, 1).int()))],
        [((0, 1), k, k, None, Full()), ((2, 3), k.half(), k.half(), None, Full())],
    ):
        with pytest.raises(InputError, match="layout"):
            layout(groups, share=1)
    where, lengths = layout([((0, 1), k, k, None, Full())], share=1), torch.ones(3, dtype=torch.int32, device=DEVICE)
    for q, told in ((draw(1, 3, 1, 8), lengths), (draw(1, 2, 2, 8), lengths), (draw(1, 2, 1, 8), lengths[:2])):
        with pytest.raises(InputError, match="decode_groups"):
            decode_groups(q, where, told)


@pytest.mark.parametrize("both", [True, False])
def test_integers_equal_attention_over_what_they_stand_for(both):
    q, k, v = tensors(2, 4, 2, 3, 150, D=20, Dv=12)
    k8, v8 = quantize(k * 3), quantize(v)
    k8 = Quantized(*(torch.cat((t, t[:, :, :5]), 2)[:, :, :150] for t in k8))  # views of tensors with room
    rng = torch.Generator().manual_seed(0)
    some = Tokens(lists(rng, 1, 2, 1, 30, 150))
    for pattern in (
        None,
        Window(5, 60),
        some,
        Union((Window(3, 9), some)),
        PerHead((((0, 1, 2), Full()), ((3,), Window(1, 4)))),
    ):
        out = decode_quantized(q, k8, v8 if both else v, pattern)
        values = v8.dequantize() if both else v
        want = attend(q.double(), k8.dequantize().double(), values.double(), pattern, impl="reference")
        torch.testing.assert_close(out.o.double(), want.o, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.lse.double(), want.lse, atol=1e-5, rtol=1e-5)


def test_quantize_rounds_to_half_a_scale_and_keeps_zeros():
    t = draw(1, 2, 9, 7) * torch.logspace(-6, 6, 9, device=DEVICE)[:, None]
    t[0, 0, 4] = 0
    made = quantize(t)
    assert ((made.dequantize() - t).abs() <= made.scale[..., None] * 0.5001).all()
    assert not made.dequantize()[0, 0, 4].any()


def test_integers_that_do_not_fit():
    q, k, v = tensors(1, 2, 1, 1, 9)
    k8 = quantize(k)
    for keys, values in (
        (k8, v.half()),
        (Quantized(k8.values, k8.scale[:, :, :8]), v),
        (Quantized(k8.values.int(), k8.scale), v),
    ):
        with pytest.raises(InputError, match="decode_quantized"):
            decode_quantized(q, keys, values)
    with pytest.raises(InputError, match="17"):
        decode_quantized(draw(1, 2, 17, 8), quantize(draw(1, 1, 20, 8)), draw(1, 1, 20, 8))


def test_a_growing_store_rarely_needs_a_new_table():
    k = draw(1, 2, 600, 8)
    pattern = PerHead((((0, 1), Full()), ((2, 3), Window(2, 5))))
    decode_units._table.cache_clear()
    # lengths count in steps of 64 here
    for M in (520, 537, 576, 580):
        attend(draw(1, 4, 1, 8), k[:, :, :M], k[:, :, :M], pattern, impl="triton")
    assert decode_units._table.cache_info().misses == 2
