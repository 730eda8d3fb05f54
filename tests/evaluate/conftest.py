"""A tiny random model with the reader's tokenizer, loaded; two tokenizers that have little in common."""

import copy
import json
from dataclasses import replace

import pytest
import tiny_model

from saccade.evaluate.model import Loaded
from saccade.reader import path


class Letters:
    """A tokenizer with a token per byte and no special tokens."""

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="session")
def letters():
    return Letters()


@pytest.fixture(scope="session")
def bpe():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(str(path()), local_files_only=True)


@pytest.fixture(params=["bpe", "letters"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoTokenizer

    model = tiny_model.model(attn_implementation="sdpa")
    return Loaded("tiny", model, AutoTokenizer.from_pretrained(str(path())))


@pytest.fixture(scope="module")
def wild(tiny):
    """The same in float64, with weights so large that each token it has read changes what it says."""
    import torch

    source = torch.Generator().manual_seed(0)
    model = copy.deepcopy(tiny.model).double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=source, dtype=torch.float64))
    return replace(tiny, model=model)


@pytest.fixture
def alike():
    """alike(task, tokenizer, length, count): samples whose texts have equally many tokens; their questions need not."""

    def draw(task, tokenizer, length, count):
        found = {}
        for index in range(40):
            sample = task.sample(tokenizer, length, index)
            same = found.setdefault(len(sample.ids), [])
            same.append(sample)
            if len(same) == count:
                return same
        raise AssertionError(f"of 40 samples no {count} have one length")

    return draw


@pytest.fixture
def evaluation():
    """evaluation(folder, rows, samples=[...], seed=1, ...) writes the folder of an evaluation; a row may be short."""

    def write(folder, rows, samples=(), heads=(), **config):
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"method": "dense", "task": "needle", "length": 4096} | row for row in rows]
        asked = {
            "model": "reader",
            **{f"{key}s": list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "task", "length")},
            "samples": 10,
            "seed": 0,
            "dtype": "float32",
            "device": "cpu",
        }
        (folder / "config.json").write_text(json.dumps(asked | config))
        for name, lines in (("rows", rows), ("samples", samples), ("heads", heads)):
            if lines:
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write
