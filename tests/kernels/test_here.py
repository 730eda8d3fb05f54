"""Kernels run where their tensors are: the decorator, a law over the package's source, and two GPUs where there are."""

import ast
import inspect
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

import saccade
from saccade.core.errors import InputError, UnsupportedError
from saccade.kernels.here import here, on

ROOT = Path(saccade.__file__).parent
# what means the current device where no device or stream is named
CURRENT = ["Stream", "current_stream", "synchronize", "set_stream", "mem_get_info", "memory_allocated"]
CURRENT += ["max_memory_allocated", "reset_peak_memory_stats", "get_device_properties", "get_device_name"]
CURRENT += ["get_device_capability"]
CURRENT = {f"torch.cuda.{name}" for name in CURRENT}


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    at = 1

    @property
    def is_cuda(self):
        return True

    @property
    def device(self):
        return torch.device("cuda", self.at)


class Machine:
    """Two GPUs: which is the current one, and how often that was changed."""

    def __init__(self):
        self.now, self.entered = 0, []

    @contextmanager
    def device(self, device):
        before, self.now = self.now, torch.device(device).index
        self.entered.append(self.now)
        try:
            yield
        finally:
            self.now = before


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.now)
    monkeypatch.setattr(torch.cuda, "device", machine.device)
    return machine


def on_gpu(at):
    t = torch.zeros(2).as_subclass(OnGpu)
    t.at = at
    return t


def test_runs_on_the_device_of_the_first_tensor(machine):
    @here
    def launch(name, x, y, *, scale=1):
        return name, machine.now, scale

    assert launch("a", on_gpu(1), on_gpu(0), scale=3) == ("a", 1, 3) and machine.now == 0
    assert launch("a", on_gpu(0), on_gpu(1)) == ("a", 0, 1)
    # a device that is the current one already is not entered again
    assert machine.entered == [1]
    machine.now = 1
    assert launch("a", on_gpu(1), on_gpu(0))[1] == 1 and launch("a", on_gpu(0), on_gpu(0))[1] == 0
    assert machine.entered == [1, 0] and machine.now == 1


def test_one_within_another_changes_the_device_once(machine):
    inner = here(lambda x: machine.now)
    outer = here(lambda x: (inner(x), inner(x)))
    assert outer(on_gpu(1)) == (1, 1) and machine.entered == [1]


def test_an_error_leaves_the_device_as_it_was(machine):
    @here
    def fails(x):
        raise ValueError(machine.now)

    with pytest.raises(ValueError, match="1"):
        fails(on_gpu(1))
    assert machine.now == 0


def test_a_cpu_asks_no_gpu(monkeypatch):
    def nobody(*_):
        raise AssertionError("a CPU has no CUDA device")

    monkeypatch.setattr(torch.cuda, "current_device", nobody)
    monkeypatch.setattr(torch.cuda, "device", nobody)
    assert here(lambda n, x: x * n)(2, torch.ones(1)).item() == 2
    with on("cpu"), on(torch.device("cpu")):
        pass


def test_without_a_tensor_nobody_knows_where():
    @here
    def launch(count, x=None):
        return count

    with pytest.raises(InputError, match=r"launch: no tensor among 1 positional"):
        launch(3, x=torch.ones(1))


def test_a_block_on_a_device(machine):
    with on("cuda:1"):
        assert machine.now == 1
    assert machine.now == 0


def test_it_keeps_name_words_and_signature():
    from saccade.kernels.transfer import sums

    kept = here(sums)
    assert kept.__name__ == "sums" and kept.__doc__ == sums.__doc__
    assert inspect.signature(kept) == inspect.signature(sums)


# The law. A launch is a call of something in brackets, `kernel[grid](...)`, in a file that imports Triton.


def decorated(node):
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(d, ast.Name) and d.id == "here" for d in node.decorator_list
    )


def takes_a_tensor(node):
    """Is a positional argument always a tensor? Else `here` would not know where."""
    return any(isinstance(a.annotation, ast.Name) and a.annotation.id == "Tensor" for a in node.args.args)


def imports_triton(tree):
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return any(name.partition(".")[0] == "triton" for name in names)


def calls(tree):
    """(call, the functions around it, is it in a `with on(...)`) for each call of a file."""

    def visit(node, around, inside):
        if isinstance(node, ast.Call):
            yield node, around, inside
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            # a function runs later, when the block around it has ended
            inside, around = False, [*around, node]
        if isinstance(node, ast.With):
            for item in node.items:
                yield from visit(item, around, inside)
            inside |= any(
                isinstance(i.context_expr, ast.Call) and ast.unparse(i.context_expr.func) == "on" for i in node.items
            )
            for child in node.body:
                yield from visit(child, around, inside)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, around, inside)

    yield from visit(tree, [], False)


def launches(tree):
    """(line, is it where its tensors are) of each launch."""
    if not imports_triton(tree):
        return
    for call, around, _ in calls(tree):
        if isinstance(call.func, ast.Subscript):
            yield call.lineno, bool(around) and decorated(around[-1]) and takes_a_tensor(around[-1])


def of_the_current_device(tree):
    """Lines that mean the current device without saying so: streams, events, graphs, and questions to a GPU."""
    for call, around, inside in calls(tree):
        name = ast.unparse(call.func)
        bare = not call.args and not call.keywords
        wrong = bare and name in CURRENT
        # an event that is recorded nowhere in particular
        wrong |= bare and isinstance(call.func, ast.Attribute) and call.func.attr == "record"
        safe = inside or (bool(around) and decorated(around[-1]))
        if name == "torch.cuda.graph":
            # without a stream, it is the first that any capture of the process made
            wrong = not safe or all(k.arg != "stream" for k in call.keywords)
            safe = False
        if wrong and not safe:
            yield call.lineno


def parsed():
    for file in sorted(ROOT.rglob("*.py")):
        yield str(file.relative_to(ROOT)), ast.parse(file.read_text(encoding="utf-8"))


def test_every_launch_is_where_its_tensors_are():
    found = [(name, *launch) for name, tree in parsed() for launch in launches(tree)]
    assert len(found) >= 30 and len({name for name, _, _ in found}) >= 17
    assert not [f"{name}:{line}" for name, line, safe in found if not safe]


def test_nothing_means_the_current_device_in_silence():
    assert not [f"{name}:{line}" for name, tree in parsed() for line in of_the_current_device(tree)]


LAUNCH = """
import triton

{above}def pool({arguments}):
    kernel: Any = _pool
    {before}kernel[(triton.cdiv(4, 2),)](x, BLOCK=2)
"""


@pytest.mark.parametrize(
    ("above", "arguments", "before", "safe"),
    [
        ("@here\n", "x: Tensor", "", True),
        ("@here\n", "count: int, x: Tensor", "for kernel in (a, b): ", True),
        ("", "x: Tensor", "", False),
        ("@lasting\n", "x: Tensor", "", False),
        # nothing by position says which device is meant
        ("@here\n", "held: Held", "", False),
        ("@here\n", "*, x: Tensor", "", False),
        # it runs when the device is another one again
        ("@here\n", "x: Tensor", "later = lambda: ", False),
        ("@here\n", "x: Tensor", "def later(): ", False),
    ],
)
def test_the_law_sees_a_launch_that_breaks_it(above, arguments, before, safe):
    tree = ast.parse(LAUNCH.format(above=above, arguments=arguments, before=before))
    assert [found for _, found in launches(tree)] == [safe]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("torch.cuda.synchronize()", 1),
        ("torch.cuda.synchronize(x.device)", 0),
        ("torch.cuda.current_stream(x.device).synchronize()", 0),
        ("side = torch.cuda.Stream()", 1),
        ("side = torch.cuda.Stream(device)", 0),
        ("side.wait_stream(torch.cuda.current_stream())", 1),
        ("with on(device): side = torch.cuda.Stream()", 0),
        ("with torch.no_grad(), on(device):\n  with torch.cuda.stream(side): torch.cuda.current_stream()", 0),
        ("with on(device):\n  def later(): return torch.cuda.Stream()", 1),
        ("@here\ndef f(x: Tensor): return torch.cuda.Stream()", 0),
        ("event.record()", 1),
        ("event.record(stream)", 0),
        ("with on(device):\n  with torch.cuda.graph(g): pass", 1),
        ("with on(device):\n  with torch.cuda.graph(g, stream=side): pass", 0),
        ("with torch.cuda.graph(g, stream=side): pass", 1),
        ("torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()", 2),
    ],
)
def test_the_law_sees_what_means_the_current_device(line, wrong):
    assert len(list(of_the_current_device(ast.parse(line)))) == wrong


# A process of its own for each GPU, and steps on the model's GPU.


@pytest.mark.parametrize(
    ("device", "set_to"), [("cuda:1", ["cuda:1"]), ("cuda:0", ["cuda:0"]), ("cuda", []), ("cpu", [])]
)
def test_a_worker_makes_its_gpu_the_current_one(device, set_to, monkeypatch):
    from saccade.evaluate import crew

    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: done.append(str(d)))
    monkeypatch.setattr(crew, "load", lambda *asked: done.append(asked))
    crew.Setup("reader", "float32", device).load()
    # before anything is loaded
    assert done == [*set_to, ("reader", "float32", device)]


def test_a_worker_says_that_there_is_no_gpu(monkeypatch):
    from saccade.evaluate import crew

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA"):
        crew.Setup("reader", "float32", "cuda:1").load()


def tiny(seed=0):
    import transformers as tf

    torch.manual_seed(seed)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=97, max_position_embeddings=512)
    made = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for name, weights in made.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                # attention that is not nearly flat, so that what is chosen shows
                weights.mul_(6)
    return made.requires_grad_(False)


def test_steps_rehearse_and_capture_on_the_models_device(monkeypatch):
    from saccade import Plan, attach
    from saccade.hf import steps as module

    streams, captured, entered = [], [], []

    class Stream:
        def __init__(self, device):
            streams.append((self, device))

        def wait_stream(self, other):
            assert isinstance(other, Stream)

    class Graph:
        def pool(self):
            return "pool"

        def replay(self):
            pass

    @contextmanager
    def graph(made, pool, stream):
        captured.append((pool, stream))
        yield

    @contextmanager
    def noted(device):
        entered.append(device)
        yield

    current = []
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current.append(device) or Stream(device))
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(module, "on", noted)
    model = tiny()
    device = next(model.parameters()).device
    ids = torch.randint(0, 97, (1, 40))
    # searched now and then: two kinds of step, two graphs
    hip = ("hip", {"budget": 24, "sink": 2, "window": 6, "block_k": 2, "refresh": 4, "first": 0})
    with attach(model, Plan.uniform(model, decode=hip)) as session, torch.no_grad():
        cache = session.cache()
        model(ids, past_key_values=cache)
        with session.steps(cache, room=8, graph=True) as step:
            for _ in range(8):
                step(ids[:, :1])
    pools, sides = zip(*captured, strict=True)
    assert pools[0] is None and set(pools[1:]) == {"pool"} and len(set(sides)) == 1
    assert [at for side, at in streams if side is sides[0]] == [device]
    # every rehearsal, capture and replay
    assert set(current) == set(entered) == {device} and len(entered) == 8 + len(captured) + len(current)


def test_steps_of_a_model_on_several_devices_are_refused():
    from saccade import Plan, attach

    model = tiny()
    with attach(model, Plan.uniform(model)) as session, torch.no_grad():
        cache = session.cache()
        model(torch.randint(0, 97, (1, 20)), past_key_values=cache)
        model.lm_head.to("meta")
        with pytest.raises(UnsupportedError, match="spread over cpu, meta"):
            session.steps(cache, room=2)


# On two GPUs: tensors on the second while the first is the current one.

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: the fault shows on the second")


def both(function, *tensors):
    """What a function of tensors gives on the second GPU, and on the CPU."""
    assert torch.cuda.current_device() == 0
    got = function(*(t.to("cuda:1") for t in tensors))
    assert torch.cuda.current_device() == 0
    want = function(*tensors)
    for a, b in zip(got, want, strict=True):
        assert a.device == torch.device("cuda", 1)
        torch.testing.assert_close(a.cpu(), b, atol=2e-3, rtol=2e-3)


def qkv(N, M, D=64, H=4, G=2):
    return torch.randn(2, H, N, D), torch.randn(2, G, M, D), torch.randn(2, G, M, D)


@two_gpus
@pytest.mark.parametrize(("N", "M"), [(200, 200), (1, 300), (90, 250)])
def test_attend_on_the_second_gpu(N, M):
    from saccade.core.pattern import Blocks, Union, Window
    from saccade.kernels.attend import attend

    index = torch.randint(0, 3, (2, 4, -(-N // 16), 1), dtype=torch.int32)
    both(lambda q, k, v, i: attend(q, k, v, Union((Blocks(i, 16, 16), Window(4, 20)))), *qkv(N, M), index)
    both(lambda q, k, v: attend(q, k, v), *qkv(N, M))


@two_gpus
def test_gradients_of_attend_on_the_second_gpu():
    from saccade.core.pattern import Window
    from saccade.kernels.attend import attend

    def gradients(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(attend(*leaves, Window(4, 50)).o.square().sum(), leaves)

    both(gradients, *qkv(150, 150))


@two_gpus
@pytest.mark.parametrize("shape", [(4,), (2, 4, 200), (2, 4, 200, 32)])
@pytest.mark.parametrize("N", [200, 3])
def test_scan_and_its_gradients_on_the_second_gpu(shape, N):
    from saccade.kernels.scan import scan

    q, k, v = (torch.randn(2, 4, N, 32) / 4 for _ in range(3))
    decay = -torch.rand(shape)[:, :, :N] if len(shape) > 1 else -torch.rand(shape)

    def run(q, k, v, decay):
        leaves = [t.detach().requires_grad_() for t in (q, k, v, decay)]
        return torch.autograd.grad(scan(*leaves)[0].square().sum(), leaves)

    both(run, q, k, v, decay)
    both(scan, q, k, v, decay)


@two_gpus
def test_selections_on_the_second_gpu():
    from saccade.core.call import Call
    from saccade.kernels.mass import key_mass
    from saccade.kernels.scores import pool, pool_bounds
    from saccade.kernels.select.vertical_slash import column_and_offset_mass, diagonal_blocks
    from saccade.kernels.topk import largest, top_pooled

    q, k, _ = qkv(300, 300)
    both(lambda q, k: [top_pooled(q, k, 4, 16, 16, Call.of(q, k)).index], q, k)
    both(lambda q, k: [key_mass(q, k, Call.of(q, k))], q, k)
    both(lambda q, k: column_and_offset_mass(q, k, Call.of(q, k), 32), q, k)
    both(lambda k: [pool(k, 16), *pool_bounds(k, 16)], k)
    both(lambda q: [largest(q[:, :, 0], 9)], q)
    offsets = torch.tensor([0, 3, 70, 150]).expand(2, 4, -1)
    seen = [diagonal_blocks(offsets.to(place), Call.of(q, k), 16) for place in ("cpu", "cuda:1")]
    sets = [[set(row) - {-1} for row in blocks.index.flatten(0, 2).tolist()] for blocks in seen]
    assert sets[0] == sets[1]


@two_gpus
def test_blocks_come_from_host_memory_to_the_second_gpu():
    from saccade.cache.tier import Tier

    k, v = torch.randn(2, 2, 64, 16), torch.randn(2, 2, 64, 16)
    tier = Tier(8, 1 << 16)
    tier.append(k.to("cuda:1"), v.to("cuda:1"))
    index = torch.tensor([5, 0, 7]).expand(2, 2, -1)
    got = tier.fetch(index)
    tier.check()
    for found, whole in zip(got, (k, v), strict=True):
        want = torch.cat([whole[:, :, 8 * i : 8 * i + 8] for i in (5, 0, 7)], 2)
        assert found.device == torch.device("cuda", 1) and torch.equal(found.cpu(), want)
    tier.close()


@two_gpus
@pytest.mark.parametrize("name", ["quest", "tidal", "hip"])
def test_an_attached_model_on_the_second_gpu(name):
    from saccade import Plan, attach

    args = {"quest": {"budget": 16, "block_k": 4}, "tidal": {"budget": 12, "correct": 2}}
    args |= {"hip": {"budget": 24, "sink": 2, "window": 6, "block_k": 2, "refresh": 4}}
    ids = torch.randint(0, 97, (1, 108))

    def logits(device, graph):
        model, there = tiny().to(device), ids.to(device)
        pooled = ("pooled", {"budget": 48, "block_q": 16, "block_k": 16})
        plan = Plan.uniform(model, prefill=pooled, decode=(name, {**args[name], "first": 0}))
        with attach(model, plan) as session, torch.no_grad():
            cache = session.cache()
            found = [model(there[:, :100], past_key_values=cache).logits[:, -1:]]
            with session.steps(cache, room=8, graph=graph) as step:
                found += [step(there[:, i : i + 1]).clone() for i in range(100, 108)]
        return torch.cat(found, 1)

    want = logits("cpu", False)
    for graph in (False, True):
        assert torch.cuda.current_device() == 0
        torch.testing.assert_close(logits("cuda:1", graph).cpu(), want, atol=5e-3, rtol=5e-3)
