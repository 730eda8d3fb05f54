"""A second device that no machine needs to have: tensors that say they are elsewhere, and are not mixed with others.

What is computed is computed on the CPU. An operator that is given tensors from two devices raises, but for those that
PyTorch, too, lets reach over: copies, indices on the CPU, single numbers on the CPU.
"""

from concurrent.futures import Future

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

HERE, THERE = torch.device("cpu"), torch.device("meta")  # the only other one that every build of PyTorch can name
MOVES = ("aten::copy_", "aten::_to_copy")
PLACES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
MADE = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}


class Elsewhere(torch.Tensor):
    """A tensor, `held` on the CPU, whose device is THERE."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        sizes = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=THERE, **sizes)

    def __init__(self, held):
        self.held = held

    def __getitem__(self, at):
        return super().__getitem__(_listed(at))

    def __setitem__(self, at, value):
        super().__setitem__(_listed(at), value)

    def tolist(self):
        return self.held.tolist()

    def __repr__(self):
        return f"elsewhere {self.held}"

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        return _work(function, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    """Inside of it tensors are made and moved there; `patched` first."""

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        return _work(function, args, kwargs or {})


def patched(monkeypatch):
    """What PyTorch does where no mode sees it: tensors of lists, threads, page-locked memory, autocast."""
    for name in MADE:
        monkeypatch.setattr(torch, name, _maker(name))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr("saccade.cache.near.ThreadPoolExecutor", _AtOnce)


def spread(model, layers):
    """Put some decoder layers there, with hooks that bring what they are given, as `device_map` does."""
    for at, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(_brings(THERE if at in layers else HERE), with_kwargs=True, prepend=True)
        if at in layers:
            for module in layer.modules():
                for name, weight in list(module._parameters.items()):
                    if weight is not None:
                        module._parameters[name] = torch.nn.Parameter(Elsewhere(weight.data), requires_grad=False)
    model.model.norm.register_forward_pre_hook(_brings(HERE), with_kwargs=True)


class _AtOnce:
    """A pool of threads without threads: a mode is seen by its own thread only."""

    def __init__(self, *given):
        pass

    def submit(self, function, *args):
        done = Future()
        done.set_result(function(*args))
        return done

    def shutdown(self, *given, **more):
        pass


def _brings(device):
    def bring(t):
        return t.to(device) if isinstance(t, torch.Tensor) else t

    def hook(module, args, kwargs):
        # a cache stays where its layers are
        kept = {"past_key_values"}
        return tree_map(bring, args), {k: v if k in kept else tree_map(bring, v) for k, v in kwargs.items()}

    return hook


def _maker(name):
    def make(data, dtype=None, device=None):
        t = MADE[name](data, dtype=dtype)
        return t if device is None else t.to(device)

    return make


def _listed(at):
    """An index with tensors in place of lists, which PyTorch would turn into tensors unseen."""
    if isinstance(at, tuple):
        return tuple(_listed(i) for i in at)
    return MADE["tensor"](at) if isinstance(at, list) else at


def _work(function, args, kwargs):
    """One operator, on the CPU; what comes out of it is where PyTorch would put it."""
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    there, name = [isinstance(t, Elsewhere) for t in given], function._schema.name
    if any(t.is_meta and not isinstance(t, Elsewhere) for t in given):
        raise RuntimeError(f"{name}: a tensor was made there that no mode has seen")
    checked = () if name in MOVES else given[:1] if name in PLACES else given
    if any(there) and any(t.ndim and not isinstance(t, Elsewhere) for t in checked):
        raise RuntimeError(f"{name}: tensors on two devices: {[(list(t.shape), t.device.type) for t in given]}")
    away = there[0] if name == "aten::copy_" else any(there)
    if kwargs.get("device") is not None:
        away, kwargs = torch.device(kwargs["device"]) == THERE, {**kwargs, "device": HERE}
    args, kwargs = tree_map(lambda t: t.held if isinstance(t, Elsewhere) else t, (args, kwargs))
    # what was written in place stays the tensor that it was
    mine = {id(t.held): t for t in given if isinstance(t, Elsewhere)}
    out = function(*args, **kwargs)
    return tree_map(lambda t: mine.get(id(t), Elsewhere(t) if away else t) if isinstance(t, torch.Tensor) else t, out)
