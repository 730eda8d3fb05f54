import pytest
import torch

from saccade.core.call import Call
from saccade.core.pattern import Full, Window
from saccade.core.plan import Assign, Plan
from saccade.evaluate.measure import looked
from saccade.evaluate.trace import SIZE, pool_mass, probabilities, read_cells, trace
from saccade.methods.apply import Seen

IDS = torch.randint(3, 4096, (256,), generator=torch.Generator().manual_seed(0)).tolist()


def test_window_in_prefill_and_in_steps(tiny):
    window = ("streaming", {"sink": 4, "recent": 32})
    found = trace(tiny, Plan.uniform(tiny.model, prefill=window, decode=window), IDS, max_new_tokens=4)
    assert sorted(found.prefill) == sorted(found.steps) == [0, 1, 2, 3]
    cells = found.prefill[2][0]
    # 256 tokens in 64 cells of 4: the window is 8 cells wide, the sinks one
    assert cells[63, 0] == 1 and cells[63, 1:55].eq(0).all() and cells[63, 57:63].eq(1).all()
    assert cells.triu(1).eq(0).all()
    assert [len(rows) for rows in found.steps.values()] == [3] * 4
    assert found.last_step().shape == (4 * 4, SIZE)
    assert found.last_step()[:, 20].eq(0).all() and found.last_step()[:, -1].gt(0).all()
    assert found.density("prefill") == pytest.approx(
        Window(4, 32).density(Call.of(*torch.zeros(2, 1, 1, 256, 1).unbind(0)))
    )


def test_what_a_policy_evicted_is_not_read(tiny):
    rows = [[Assign((0,), "duo", {"sink": 4, "recent": 32}, "cache")], *([[]] * 3)]
    found = trace(tiny, Plan.per_head(tiny.model, rows), IDS, max_new_tokens=3)
    last = found.steps[0][-1]
    assert last[:2, 10:50].eq(0).all() and last[:2, 0].gt(0.7).all()
    assert last[2:].gt(0.9).all()
    assert found.steps[1][-1].gt(0.9).all()
    # heads 0 and 1 of layer 0 are drawn from one group, 2 and 3 from the other
    assert found.prefill[0][0, 63, 30] == 0 and found.prefill[0][2, 63, 30] == 1


@pytest.mark.parametrize("cache", ["h2o", "duo", "offload"])
def test_a_plan_is_shown_by_the_phase_that_it_makes_sparse(tiny, cache):
    args = {"h2o": {"heavy": 8, "recent": 8}, "duo": {"sink": 4, "recent": 8}, "offload": {"sink": 4, "recent": 8}}
    decode = ("fetch", {"blocks": 1}) if cache == "offload" else None
    plan = Plan.uniform(tiny.model, decode=decode, cache=(cache, args[cache]))
    row = looked(trace(tiny, plan, IDS, max_new_tokens=4), plan)
    if cache == "duo":
        # it shows a window of the prompt
        assert row["density"] == row["density_prefill"] < 0.2 and 0 < row["mass"] < 1
    else:
        # the prompt is read whole (h2o scores it once more to vote), and what was dropped has no weight to be missed
        assert (
            row["density_prefill"] == (2.0 if cache == "h2o" else 1.0)
            and row["density"] == row["density_decode"] < 0.7
            and row["mass"] is None
        )


def test_finder_is_the_head_with_most_weight_on_the_span(tiny):
    found = trace(tiny, None, IDS, drawn=(0, 1, 2, 3), span=(100, 120))
    layer, head = found.finder()
    assert found.finders[layer][head] == max(f.max() for f in found.finders.values())
    assert all(0 < float(f.max()) < 1 for f in found.finders.values())
    assert found.prefill[0].shape == (4, SIZE, SIZE)


def test_weights_are_those_of_softmax():
    q, k = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)
    call = Call.of(q, k)
    seen = Seen(call=call, q=q, k=k, v=k, pattern=Full(), estimate=0.0, methods=())
    mine = probabilities(seen, 3)
    scores = (q[0, 3] @ k[0, 1].T / 8**0.5).masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf"))
    assert torch.allclose(mine, scores.softmax(-1), atol=1e-6)
    last = probabilities(seen, 3, last=True)
    assert torch.allclose(last[0], mine[-1])
    assert pool_mass(mine).shape == (40, 40)
    assert pool_mass(mine).amax(-1).eq(1).all()


def test_read_cells_counts_positions_not_slots():
    # a store that kept positions 0, 1 and 126..127 of 128
    k_pos = torch.tensor([[[0, 1, 126, 127]]])
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4, 2)
    call = Call.of(q, k, q_pos=torch.tensor([[127]]), k_pos=k_pos)
    cells = read_cells(Full(), call, 128)[0]
    assert cells.nonzero().flatten().tolist() == [0, 63]
    assert cells[0] == cells[63] == 1


def test_layer_that_reads_least_is_picked(tiny):
    rows = [[], [], [Assign(None, "streaming", {"sink": 4, "recent": 8}, "decode")], []]
    found = trace(tiny, Plan.per_head(tiny.model, rows), IDS, max_new_tokens=3)
    assert found.picked_layer("decode") == 2
