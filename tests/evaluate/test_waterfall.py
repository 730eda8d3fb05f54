"""The clock: planted delays land in their part, and parts sum to the whole."""

import time
from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saccade.cache.group import Group
from saccade.core.clock import PARTS
from saccade.core.errors import InputError
from saccade.core.plan import Assign, Plan
from saccade.evaluate import waterfall as module
from saccade.evaluate.waterfall import Laps, waterfall
from saccade.hf.attach import attach
from saccade.methods import apply as apply_module
from saccade.methods.policy.snapkv import SnapKV
from saccade.methods.select.hyper import HyperAttention
from saccade.methods.select.streaming import Streaming

IDS = torch.randint(3, 4096, (150,), generator=torch.Generator().manual_seed(0)).tolist()
LAYERS, STEPS = 4, 3
WINDOW = ("streaming", {"sink": 2, "recent": 9})
CPU = torch.device("cpu")


@pytest.fixture
def later(monkeypatch):
    """A time that stands still, but for one second in every call of what is named."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(owner, name):
        real = owner[name] if isinstance(owner, dict) else getattr(owner, name)

        def call(*args, **kwargs):
            now[0] += 1
            return real(*args, **kwargs)

        put = monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr
        put(owner, name, call)

    return slow


def plans(shape):
    return {
        "both": Plan.uniform(shape, prefill=WINDOW, decode=WINDOW),
        "heads": Plan(shape, ((Assign((1,), *WINDOW, "prefill"), Assign((0,), *WINDOW, "decode")),) * 4),
        "policy": Plan.uniform(shape, cache=("snapkv", {"capacity": 80, "slack": 1})),
        "answer": Plan.uniform(shape, prefill=("hyper", {"block": 16, "samples": 16, "exact_below": 32})),
        "stock": None,
    }


def test_parts_sum_to_the_time_between_first_and_last(monkeypatch):
    now = iter([10.0, 11.5, 11.75, 14.0, 14.25, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    laps = Laps(CPU)
    laps.start()
    for part in ("rest", "select", "attend", "select", "rest"):
        laps.lap(part)
    assert laps.seconds() == {"select": 0.5, "attend": 2.25, "copy": 0.0, "rest": 7.25}


def test_a_part_that_is_none_is_refused():
    with pytest.raises(InputError, match="'think' is none of"):
        Laps(CPU).lap("think")


@pytest.mark.parametrize(
    "plan, owner, name, part, prefill, decode",
    [
        ("both", Streaming, "select", "select", LAYERS, LAYERS),
        ("heads", Streaming, "select", "select", LAYERS, LAYERS),
        ("both", apply_module, "attend", "attend", LAYERS, LAYERS),
        ("heads", apply_module, "attend", "attend", LAYERS, LAYERS),
        ("both", Group, "append", "copy", LAYERS, LAYERS),
        # eviction after a step waits for the next one: the first finds nothing to do, and one is within the slack
        ("policy", SnapKV, "keep", "select", LAYERS, LAYERS * (STEPS - 1) / STEPS),
        ("policy", Group, "keep", "copy", LAYERS, LAYERS / STEPS),
        ("answer", HyperAttention, "attend", "attend", LAYERS, 0),
        ("stock", ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", "attend", LAYERS, LAYERS),
        ("stock", DynamicCache, "update", "copy", LAYERS, LAYERS),
        ("stock", torch.nn.functional, "silu", "rest", LAYERS, LAYERS),
    ],
)
def test_a_second_lands_in_its_part(tiny, later, plan, owner, name, part, prefill, decode):
    before = tiny.model.config._attn_implementation
    later(owner, name)
    found = waterfall(tiny, plans(tiny.shape)[plan], IDS, steps=STEPS, warm=30)
    for phase, seconds in (("prefill", prefill), ("decode", decode)):
        assert found[phase] == dict.fromkeys(PARTS, 0.0) | {part: pytest.approx(seconds)}
    assert tiny.model.config._attn_implementation == before


def test_the_sum_is_the_wall_time(tiny, monkeypatch):
    real, walls = module._run, []

    def run(*args):
        start = time.perf_counter()
        out = real(*args)
        walls.append(time.perf_counter() - start)
        return out

    def slow(*args, **kwargs):
        time.sleep(0.01)
        return select(*args, **kwargs)

    select = Streaming.select
    monkeypatch.setattr(Streaming, "select", slow)
    monkeypatch.setattr(module, "_run", run)
    found = waterfall(tiny, plans(tiny.shape)["both"], IDS, steps=STEPS, warm=20)
    whole = sum(found["prefill"].values()) + STEPS * sum(found["decode"].values())
    # two runs, the first to warm up; beside the laps there is nothing but making the first tensor
    assert len(walls) == 2 and 0.9 * walls[1] <= whole <= walls[1]


def test_a_clock_changes_no_number(tiny):
    class Count:
        laps = 0

        def lap(self, part):
            self.laps += 1

    for plan in plans(tiny.shape).values():
        if plan is None:
            continue
        said = []
        for clock in (None, Count()):
            with attach(tiny.model, plan) as session, torch.inference_mode():
                assert session.clock is None
                session.clock = clock
                cache = session.cache()
                tiny.model(torch.tensor([IDS]), past_key_values=cache)
                said.append([tiny.model(torch.tensor([[t]]), past_key_values=cache).logits for t in (7, 8, 9)])
        assert clock.laps > 4 * LAYERS * 3
        assert all(torch.equal(a, b) for a, b in zip(*said, strict=True))


def test_padded_rows_and_foreign_caches_are_clocked(tiny):
    laps = Laps(CPU)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    with attach(tiny.model, plans(tiny.shape)["heads"]) as session, torch.inference_mode():
        session.clock = laps
        for cache in (session.cache(), DynamicCache(config=tiny.model.config)):
            laps.start()
            tiny.model(torch.tensor([IDS[:40], IDS[40:80]]), attention_mask=mask, past_key_values=cache)
            found = laps.seconds()
            assert all(found[part] > 0 for part in ("select", "attend", "copy"))


def test_nothing_to_clock_is_refused(tiny):
    with pytest.raises(InputError, match="steps >= 1"):
        waterfall(tiny, None, IDS, steps=0)
    with pytest.raises(InputError, match="a prompt"):
        waterfall(tiny, None, [])


def test_a_cpu_warms_up_with_a_short_prompt(tiny, monkeypatch):
    lengths = []
    hook = tiny.model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    try:
        waterfall(tiny, None, IDS * 2, steps=2)
        waterfall(tiny, None, IDS, steps=1, warm=0)
    finally:
        hook.remove()
    assert lengths == [module.WARM, 1, 1, 300, 1, 1, 150, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["both", "policy", "stock"])
def test_events_sum_to_the_wall_time(tiny, monkeypatch, name):
    from saccade.evaluate.costs import peak
    from saccade.evaluate.model import Loaded

    loaded = Loaded("tiny", tiny.model.to("cuda"), tiny.tokenizer)
    real, walls = module._run, []

    def run(*args):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = real(*args)
        walls.append(time.perf_counter() - start)
        return out

    monkeypatch.setattr(module, "_run", run)
    try:
        with peak(loaded.device) as most:
            found = waterfall(loaded, plans(loaded.shape)[name], IDS, steps=STEPS)
    finally:
        tiny.model.to("cpu")
    whole = sum(found["prefill"].values()) + STEPS * sum(found["decode"].values())
    assert 0.9 * walls[-1] <= whole <= 1.01 * walls[-1]
    assert all(spent >= 0 for parts in found.values() for spent in parts.values())
    # keys and values of the prompt at least: 4 layers, 2 heads of width 8, 4 bytes
    assert most.bytes >= (0 if name == "policy" else 2 * 4 * 2 * 8 * 4 * len(IDS))
