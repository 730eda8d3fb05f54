"""What is true of seer: the paper's gate in loops, its counts, its causality, and files that are refused."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saccade.core.call import Call
from saccade.core.errors import FileError, InputError, PlanError, UnsupportedError
from saccade.core.pattern import Full
from saccade.core.plan import ModelShape, Plan
from saccade.core.rope import Rope
from saccade.kernels.gate import gate_keys, gate_queries, gate_scores, key_features
from saccade.methods.gates import save_gate
from saccade.methods.sparse.seer import Seer

LAYERS, H, G, D, BLOCK = 2, 4, 2, 6, 16
FREQUENCIES = [1.0, 0.31, 0.07]


def turned(x, position):
    """One vector rotated to a position, halves paired, by complex numbers."""
    half = len(x) // 2
    pairs = [complex(x[i], x[half + i]) for i in range(half)]
    pairs = [
        p * complex(math.cos(position * f), math.sin(position * f)) for p, f in zip(pairs, FREQUENCIES, strict=True)
    ]
    return [p.real for p in pairs] + [p.imag for p in pairs]


def rotated(x):
    """[B,h,N,D] rotated to positions 0, 1, ..."""
    return torch.tensor(
        [[[turned(v, i) for i, v in enumerate(head)] for head in row] for row in x.tolist()], dtype=x.dtype
    )


def scores_by_loop(free_q, free_k, weight, first, b, h):
    """The gate's scores of one head from unrotated q and k, as the paper defines them."""
    q, k, w = free_q[b, h].tolist(), free_k[b, h * free_k.shape[1] // free_q.shape[1]].tolist(), weight[h].tolist()
    asked, keys = [], []
    for s in range(0, len(q), BLOCK):
        rows = q[s : s + BLOCK]
        asked.append(turned([sum(c) / len(rows) for c in zip(*rows, strict=True)], first + s))
    for s in range(0, len(k), BLOCK):
        columns = list(zip(*k[s : s + BLOCK], strict=True))
        features = [*map(max, columns), *map(min, columns), *(sum(c) / len(c) for c in columns)]
        keys.append(turned([sum(f * w[i][d] for i, f in enumerate(features)) for d in range(D)], s))
    return [[sum(x * y for x, y in zip(a, c, strict=True)) / math.sqrt(D) for c in keys] for a in asked]


@pytest.fixture
def gate(tmp_path):
    """A file with random matrices, and the matrices."""
    weights = [torch.randn(H, 3 * D, D, dtype=torch.float32) for _ in range(LAYERS)]
    save_gate(tmp_path / "gate.safetensors", weights, BLOCK)
    return str(tmp_path / "gate.safetensors"), weights


def draw(N, B=2):
    free_q, free_k = torch.randn(B, H, N, D, dtype=torch.float64), torch.randn(B, G, N, D, dtype=torch.float64)
    rope = Rope(torch.tensor(FREQUENCIES, dtype=torch.float64))
    q, k = rotated(free_q), rotated(free_k)
    return free_q, free_k, q, k, Call.of(q, k, layer=1, rope=rope)


@pytest.mark.parametrize(("N", "past"), [(128, 0), (83, 0), (16, 0), (7, 0), (83, 32), (83, 37)])
@pytest.mark.parametrize("tail", [0, 2])
def test_matches_the_papers_gate_in_loops(gate, N, past, tail):
    path, weights = gate
    free_q, free_k, q, k, call = draw(N)
    q, call = q[:, :, past:], Call.of(q[:, :, past:], k, layer=1, rope=call.rope)
    method = Seer(path, budget=2 * BLOCK + 1, tail=tail)
    pattern = method.select(q, k, call)
    keys = gate_keys(key_features(k, BLOCK, call.rope), weights[1], BLOCK, call.rope)
    got = gate_scores(gate_queries(q, past, BLOCK, call.rope), keys)
    rows = -(-(N - past) // BLOCK)
    for b in range(2):
        for h in range(H):
            want = scores_by_loop(free_q[:, :, past:], free_k, weights[1].double(), past, b, h)
            torch.testing.assert_close(got[b, h], torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=1e-6)
            for i in range(rows):
                first, last = past + i * BLOCK, min(past + (i + 1) * BLOCK, N) - 1
                seen = [j for j in range(last // BLOCK + 1)]
                own = set(range(first // BLOCK, last // BLOCK + 1))
                best = sorted(seen, key=lambda j, i=i, own=own, want=want: (j not in own, -want[i][j]))[:3]
                expected = seen if i >= rows - tail else sorted(best)
                if isinstance(pattern, Full):
                    assert rows <= tail
                else:
                    assert [j for j in pattern.index[b, h, i].tolist() if j >= 0] == expected


def test_counts_of_blocks(gate):
    path, _ = gate
    *_, q, k, call = draw(160, B=1)
    for budget, count in [(1, 1), (BLOCK, 1), (BLOCK + 1, 2), (0.3, 3), (1.0, 10), (1 << 20, 10)]:
        found = Seer(path, budget=budget, tail=0).select(q, k, call)
        held = (found.index >= 0).sum(-1)
        assert (held == torch.arange(1, 11).clamp(max=count)).all()
        held = (Seer(path, budget=budget).select(q, k, call).index >= 0).sum(-1)
        assert (held[..., :8] == torch.arange(1, 9).clamp(max=count)).all()
        assert (held[..., 8:] == torch.tensor([9, 10])).all()
    assert Seer(path, budget=1.0).select(q, k, call).density(call) == 1.0
    # k = int((1 - sqrt(1 - r)) n) blocks in every row make the share r of the triangle
    for r in (0.19, 0.5, 0.75):
        n = 400
        k_of_r = (1 - math.sqrt(1 - r)) * n
        read = sum(min(i + 1, round(k_of_r)) for i in range(n)) / (n * (n + 1) / 2)
        assert abs(read - r) < 0.005


def test_the_own_block_is_read_even_where_the_gate_is_against_it(tmp_path):
    # a gate whose keys are minus the block's mean, and keys that are like the queries
    weights = torch.cat((torch.zeros(1, 2 * D, D), -torch.eye(D)[None]), 1)
    save_gate(tmp_path / "g", [weights], BLOCK)
    q = torch.ones(1, 1, 96, D) * torch.linspace(1, 2, 96)[:, None]
    call = Call.of(q, q, rope=Rope(torch.zeros(D // 2)))
    index = Seer(str(tmp_path / "g"), budget=2 * BLOCK, tail=0).select(q, q, call).index[0, 0]
    assert index.tolist() == [[0, -1], [0, 1], [0, 2], [0, 3], [0, 4], [0, 5]]


def test_blocks_behind_do_not_reach_the_gate_but_a_blocks_own_later_tokens_do(gate):
    path, weights = gate
    *_, q, k, call = draw(96, B=1)

    def scores(q, k):
        keys = gate_keys(key_features(k, BLOCK, call.rope), weights[1], BLOCK, call.rope)
        return gate_scores(gate_queries(q, 0, BLOCK, call.rope), keys)

    before = scores(q, k)
    q2, k2 = q.clone(), k.clone()
    q2[:, :, 48:] += 1.0
    k2[:, :, 48:] += 1.0
    assert torch.equal(scores(q2, k2)[:, :, :3, :3], before[:, :, :3, :3])
    q2 = q.clone()
    q2[:, :, 47] += 1.0
    after = scores(q2, k)
    assert not torch.isclose(after[:, :, 2], before[:, :, 2]).any()
    assert torch.equal(after[:, :, [0, 1, 3, 4, 5]], before[:, :, [0, 1, 3, 4, 5]])


def test_tiles_of_rows_choose_alike(gate, monkeypatch):
    *_, q, k, call = draw(200)
    method = Seer(gate[0], budget=48)
    want = method.select(q, k, call)
    monkeypatch.setattr("saccade.methods.sparse.seer.TILE", 1)
    monkeypatch.setattr("saccade.kernels.gate.ROWS", 40)
    assert torch.equal(method.select(q, k, call).index, want.index)


def test_half_precision_is_pooled_in_float32(gate):
    *_, q, k, call = draw(96, B=1)
    half = [t.bfloat16() for t in (q, k)]
    got = key_features(half[1], BLOCK, call.rope)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, key_features(half[1].double(), BLOCK, call.rope).float(), atol=1e-5, rtol=1e-5)
    assert Seer(gate[0], budget=32).select(*half, call).index.shape == (1, H, 6, 6)


def test_a_plan_without_weights_is_refused_before_anything_runs():
    with pytest.raises(PlanError, match=r"weights.*saccade\.fit\.seer"):
        Plan.uniform(ModelShape(2, 4, 2), prefill="seer")
    with pytest.raises(InputError, match="must be a path"):
        Seer(weights=3)
    for bad in ({"budget": 0}, {"budget": 1.5}, {"tail": -1}, {"tail": True}):
        with pytest.raises(InputError, match="Seer"):
            Seer("x", **bad)


def test_a_plan_for_another_model_is_refused(gate):
    plan = Plan.uniform(ModelShape(LAYERS, H, G), prefill=("seer", {"weights": gate[0]}))
    assert Plan.from_json(plan.to_json()) == plan
    for shape in [ModelShape(LAYERS, 2 * H, G), ModelShape(LAYERS + 1, H, G), ModelShape(1, H, G)]:
        with pytest.raises(PlanError, match="2 layers of 4 query heads"):
            Plan.uniform(shape, prefill=("seer", {"weights": gate[0]}))
    method, rope = Seer(gate[0]), Rope(torch.rand(2))
    for width, heads, layer in [(4, H, 0), (D, 2 * H, 0), (D, H, 2)]:
        q = torch.randn(1, heads, 100, width)
        with pytest.raises(InputError, match="another model's"):
            method.select(q, q, Call.of(q, q, layer=layer, rope=rope))


def test_calls_that_are_not_served(gate):
    *_, q, k, call = draw(40, B=1)
    with pytest.raises(UnsupportedError, match="unrotated"):
        Seer(gate[0]).select(q, k, Call.of(q, k))
    holes = Call.of(q, k, rope=call.rope, q_pos=torch.arange(40)[None], k_pos=torch.arange(40)[None, None])
    with pytest.raises(UnsupportedError, match="holes"):
        Seer(gate[0]).select(q, k, holes)


def damaged(path):
    """(what is wrong with it, the file) for many files."""
    good, tensors = path.read_bytes(), load_file(path)
    sizes = {"saccade_gate": "1", "block": "16", "layers": "2", "heads": "4", "width": "6"}

    def write(name, tensors=tensors, **changed):
        file = path.parent / name
        save_file(tensors, file, {k: v for k, v in {**sizes, **changed}.items() if v is not None})
        return file

    def raw(name, data):
        (path.parent / name).write_bytes(data)
        return path.parent / name

    first, second = tensors["layers.0.key"], tensors["layers.1.key"]
    yield "no such file|No such file", path.parent / "none"
    yield "not a file", path.parent
    yield "damaged", raw("cut", good[:-7])
    yield "damaged", raw("short", good[:4])
    yield "damaged", raw("empty", b"")
    yield "damaged", raw("text", b"hello, this is no tensor file")
    yield "damaged", raw("huge", (1 << 60).to_bytes(8, "little") + good[8:])
    header = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    header["layers.0.key"]["data_offsets"] = [0, 1 << 50]
    text = json.dumps(header).encode()
    yield "damaged", raw("offsets", len(text).to_bytes(8, "little") + text + good[-100:])
    yield "not a gate file", write("other", saccade_gate=None)
    yield "version", write("new", saccade_gate="2")
    for value in ("0", "-1", "1e3", "999999", "", "²", None):
        yield "block in its metadata", write("block", block=value)
    yield "should have 3 layers", write("layers", layers="3")
    yield "unknown", write("more", {**tensors, "extra": first.clone()})
    yield "should be 8 x 18 x 6", write("heads", heads="8")
    yield "should be 4 x 24 x 8", write("width", width="8")
    yield "in I32", write("ints", {"layers.0.key": first.int(), "layers.1.key": second})
    yield "4 x 18", write("flat", {"layers.0.key": first[:, :, 0].clone(), "layers.1.key": second})


def test_files_that_are_none(gate):
    seen = 0
    for says, file in damaged(Path(gate[0])):
        with pytest.raises(FileError, match=says):
            Seer(str(file))
        seen += 1
    assert seen > 20
    with pytest.raises(FileError, match="cannot be read"):
        Seer("a\0b")


def test_weights_that_are_not_finite_are_refused_when_read(gate, tmp_path):
    weights = [w.clone() for w in gate[1]]
    weights[1][0, 0, 0] = float("nan")
    save_gate(tmp_path / "nan", weights, BLOCK)
    *_, q, k, call = draw(96, B=1)
    with pytest.raises(FileError, match=r"layers\.1.*not finite"):
        Seer(str(tmp_path / "nan")).select(q, k, call)


def test_a_replaced_file_is_noticed_and_a_failed_save_leaves_the_old_one(gate, monkeypatch):
    path, weights = gate
    *_, q, k, call = draw(200, B=1)
    method = Seer(path, budget=32)
    before = method.select(q, k, call).index
    with open(path, "rb") as held:
        old = held.read()
        save_gate(path, [-w for w in weights], BLOCK)
        # who has the old file open goes on reading it: nothing was written into it
        held.seek(0)
        assert held.read() == old != Path(path).read_bytes()
    os.utime(path, ns=(1, 1))
    after = method.select(q, k, call).index
    assert not torch.equal(before, after)

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("saccade.methods.gates.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_gate(path, weights, BLOCK)
    assert torch.equal(method.select(q, k, call).index, after)
    assert os.listdir(os.path.dirname(path)) == ["gate.safetensors"]


def test_only_gates_are_saved(tmp_path):
    for bad in [[], [torch.zeros(2, 12, 6)], [torch.zeros(2, 18, 6), torch.zeros(3, 18, 6)], [torch.zeros(18, 6)]]:
        with pytest.raises(InputError, match="save_gate"):
            save_gate(tmp_path / "g", bad, BLOCK)
    with pytest.raises(FileError, match="no folder"):
        save_gate(tmp_path / "none" / "g", [torch.zeros(2, 18, 6)], BLOCK)


def test_the_instance_holds_its_hyperparameters_alone(gate):
    method = Seer(gate[0])
    *_, q, k, call = draw(96, B=1)
    method.select(q, k, call)
    assert vars(method) == {"weights": gate[0], "budget": 0.1, "tail": 2}
    assert method.block_k == BLOCK and method.weights_for == (LAYERS, H, D)


def test_cost_is_small_and_said(gate):
    call = Call.of(torch.empty(1, H, 1 << 15, 1), torch.empty(1, G, 1 << 15, 1))
    n = (1 << 15) // BLOCK
    assert Seer(gate[0]).estimate(call) == H * n * (n - 2 + 3 * D)
    assert Seer(gate[0]).estimate(call) < 0.01 * Full().pairs(call)
