"""Bytes by a loop over slots, operations against torch's own counter, and pairs counted on a mask."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from saccade.core.call import Call
from saccade.core.errors import UnsupportedError
from saccade.core.pattern import Blocks, Full, PerHead, Tokens, Union, Window
from saccade.core.plan import Plan
from saccade.evaluate.costs import Work, ceiling, peak, read_bytes, work_of
from saccade.evaluate.fidelity import fidelity, read_dense
from saccade.evaluate.model import Loaded
from saccade.hf.meter import Meter
from saccade.methods.apply import Seen


def seen_of(pattern, H=4, G=2, N=1, M=50, D=8, Dv=6, dtype=torch.float32, estimate=0.0, **fields):
    q, k, v = torch.zeros(1, H, N, D), torch.zeros(1, G, M, D), torch.zeros(1, G, M, Dv)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    return Seen(Call.of(q, k, **fields), q, k, v, pattern, estimate, ())


def slots_read(seen):
    """(key head, slot) pairs, one by one."""
    mask = seen.pattern.mask(seen.call)[0]
    share = seen.call.shape.H // seen.call.shape.G
    return {(h // share, j) for h, i, j in mask.nonzero().tolist()}


def draw(H, lines, count, most):
    return (
        torch.stack([torch.randperm(most)[:count].sort().values for _ in range(H * lines)])
        .view(1, H, lines, count)
        .int()
    )


PATTERNS = [
    Full(),
    Window(3, 10),
    Tokens(draw(4, 1, 7, 50)),
    Tokens(draw(2, 1, 7, 50)),
    Blocks(draw(4, 1, 3, 7), 1, 8),
    Union((Window(2, 5), Tokens(draw(4, 1, 4, 50)))),
    PerHead((((0, 2), Window(1, 4)), ((1, 3), Full()))),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_slots(pattern, dtype):
    seen = seen_of(pattern, dtype=dtype)
    assert read_bytes(seen) == len(slots_read(seen)) * (8 + 6) * dtype.itemsize


def test_several_queries_read_a_slot_once():
    seen = seen_of(Tokens(draw(4, 3, 7, 50)), N=3)
    assert read_bytes(seen) == len(slots_read(seen)) * 14 * 4
    assert len(slots_read(seen)) < seen.pattern.pairs(seen.call)


def test_only_what_is_stored_is_read():
    k_pos = torch.tensor([[[0, 1, 40, 41, 42, -1]]]).expand(1, 2, -1)
    seen = seen_of(Window(1, 2), M=6, q_pos=torch.tensor([[42]]), k_pos=k_pos)
    assert read_bytes(seen) == 2 * 3 * 14 * 4


def test_what_is_scored_to_choose_is_read_once_for_a_group():
    # two products for each of 6 pages and 4 query heads, which share 2 key heads: 12 rows a key head
    seen = seen_of(Window(0, 1), estimate=2.0 * 6 * 4)
    assert read_bytes(seen) == 2 * 14 * 4 + 2 * 12 * 8 * 4
    # no pattern: keys and values of all that was scored
    assert read_bytes(seen_of(None, estimate=48.0)) == 24 * 14 * 4
    # and keys alone of what only chose
    assert read_bytes(replace(seen_of(None, estimate=48.0), scored=20.0)) == 14 * 14 * 4 + 10 * 8 * 4
    assert math.isnan(read_bytes(seen_of(None, estimate=math.nan)))


def test_a_step_of_quest_by_hand(tiny):
    ids = torch.randint(3, 4096, (256,)).tolist()
    dense = read_dense(tiny, ids, most=2, stop="", least=2)
    found = fidelity(
        tiny,
        Plan.uniform(tiny.model, decode=("quest", {"budget": 64, "block_k": 32, "first": 1, "together": True})),
        dense,
    )
    # one step at 257 keys: layer 0 whole; then 2 pages (one of them the query's own, with a single slot), 8 page bounds
    row = 8 * 4
    sparse = 2 * ((32 + 1) * 2 * row + 2 * 8 * row)
    assert found.read_bytes == 2 * 257 * 2 * row + 3 * sparse


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_what_torch_counts(tied):
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, head_dim=10)
    config = LlamaConfig(
        vocab_size=50, num_key_value_heads=2, attn_implementation="eager", tie_word_embeddings=tied, **sizes
    )
    model = LlamaForCausalLM(config).eval()
    work = work_of(Loaded("m", model, None), (10, 10))
    counter = FlopCounterMode(display=False)
    N = 31
    with counter, torch.no_grad():
        model(torch.zeros(1, N, dtype=torch.long), logits_to_keep=1)
    counts = counter.get_flop_counts()
    # the angles of rotation are a matrix product, too
    whole = counter.get_total_flops() - sum(counts.get("LlamaForCausalLM.model.rotary_emb", {}).values())
    # eager attention forms all N x N pairs
    assert whole == N * work.token + work.head + work.heads * N * N * work.pair
    assert work.prefill(N) == whole - work.heads * N * (N - 1) / 2 * work.pair


def test_ceiling_counts_what_is_left(tiny):
    N = 200
    ids = torch.randint(3, 4096, (N,)).tolist()
    dense = read_dense(tiny, ids, most=1, stop="", least=1)
    found = fidelity(tiny, Plan.uniform(tiny.model, prefill=("streaming", {"sink": 2, "recent": 9}), skip=[3]), dense)
    pairs = sum(min(i + 1, 11) for i in range(N)) * 4 * 3 + N * (N + 1) // 2 * 4
    every = N * (N + 1) // 2 * 4 * 4
    weights = sum(p.numel() for name, p in tiny.model.named_parameters() if "proj" in name)
    head = 4096 * 32
    want = (2 * weights * N + 2 * head + 32 * every) / (2 * weights * N + 2 * head + 32 * pairs)
    assert ceiling(tiny, N, dense.widths, found.look) == pytest.approx(want, rel=1e-9)
    assert ceiling(tiny, N, dense.widths, Meter()) is None
    whole = fidelity(tiny, Plan.uniform(tiny.model), dense)
    assert ceiling(tiny, N, dense.widths, whole.look) == 1.0


def test_choosing_lowers_the_ceiling():
    work = Work(token=0.0, head=0.0, pair=4.0, score=2.0, heads=3)
    assert work.ceiling(100, 0.25, 0.0) == 4.0
    assert work.ceiling(100, 0.25, 0.5) == 2.0


def test_experts_are_refused(tiny):
    sizes = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_local_experts=2, **sizes)).eval()
    with pytest.raises(UnsupportedError, match="experts"):
        work_of(Loaded("moe", model, None), (8, 8))
    meter, seen = Meter(), seen_of(Window(0, 4), N=20, M=20)
    meter(seen)
    assert ceiling(Loaded("moe", model, None), 20, (8, 8), meter) is None


def test_no_peak_is_known_on_a_cpu():
    with peak(torch.device("cpu")) as found:
        torch.zeros(1000)
    assert found.bytes is None
