"""Every method's instances for tiny models of transformers: the models, the plans, tokens."""

import pytest
import torch

from saccade import Plan
from saccade.methods.base import Layer
from saccade.testing import instances

TINY = dict(
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=61,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    # scores that differ, so that what a method leaves out is missed, but no softmax of exactly 1: ties fall either way
    initializer_range=0.2,
)
ALL = {name: method for name, method in instances().items() if not isinstance(method, Layer)}
# one instance of each method in the quick run; of these two the one that builds no graph and reads in larger pieces
SLOW = {name for name in ALL if "-" in name} - {"retrieval-flat", "offload-no_sink"} | {"retrieval", "offload"}


def each_of(names):
    """A test for each name, the slow ones marked."""
    marked = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]
    return pytest.mark.parametrize("name", marked)


def make(cls, config, **more):
    torch.manual_seed(0)
    return cls(config(**{**TINY, **more})).double().eval()


def plan_of(name, model):
    """The method in all its phases; several joined by "+", each in its own."""
    methods = [ALL[part] for part in name.split("+")]
    return Plan.uniform(model, **{phase: method for method in methods for phase in method.phases})


def tokens(rows, length, seed=0):
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))
