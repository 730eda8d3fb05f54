"""The decoder: causal, the same in any split, with layers of any kind, and its way of starting."""

import pytest
import torch
from torch import nn

from saccade.core.errors import InputError
from saccade.methods.base import Layer, Output
from saccade.nn import MLP, Attention, Transformer


class Mean(Layer):
    """The mean of all tokens so far, with a loss: the least that a layer of one's own must do."""

    def __init__(self, width, loss):
        super().__init__()
        self.loss = loss
        self.o_proj = nn.Linear(width, width)

    def forward(self, x, state=None):
        total, past = (0.0, 0) if state is None else state
        total = total + x.cumsum(1)
        count = past + torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return Output(self.o_proj(total / count), (total[:, -1:], past + x.shape[1]), x.new_tensor(self.loss))


def decoder(*layers, **options):
    return Transformer(50, 32, layers or [Attention(32, 4, 2) for _ in range(3)], mlp_width=64, **options).double()


MODELS = {
    "dense": lambda: decoder(),
    "mixed": lambda: decoder(Attention(32, 4, 2), Mean(32, 1.5), Attention(32, 2), Mean(32, 0.25)),
    "untied": lambda: decoder(tie=False),
}


@pytest.mark.parametrize("kind", MODELS)
def test_any_split_gives_the_same(kind):
    model, ids = MODELS[kind](), torch.randint(0, 50, (2, 21))
    state, parts = None, []
    for some in ids.tensor_split((10, 11, 12), dim=1):
        logits, state, _ = model(some, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).y)


@pytest.mark.parametrize("kind", MODELS)
def test_later_tokens_change_nothing_before(kind):
    model, ids = MODELS[kind](), torch.randint(0, 49, (1, 12))
    other = ids.clone()
    other[:, 7] += 1
    one, two = model(ids).y, model(other).y
    torch.testing.assert_close(one[:, :7], two[:, :7])
    assert not torch.allclose(one[:, 7:], two[:, 7:])


def test_losses_of_the_layers_add_up():
    ids = torch.tensor([[1, 2, 3]])
    assert MODELS["dense"]()(ids).loss is None
    assert MODELS["mixed"]()(ids).loss.item() == 1.75


def test_hidden_and_head_are_forward():
    model, ids = decoder(), torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model.head(model.hidden(ids).y), model(ids).y)


def test_what_writes_to_the_stream_starts_smaller():
    torch.manual_seed(0)
    model = Transformer(500, 128, [Attention(128, 4), Mean(128, 0.0)], mlp_width=256)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            want = 0.01 if name.split(".")[-2] in ("o_proj", "down_proj") else 0.02
            assert weight.std().item() == pytest.approx(want, rel=0.05), name
        else:
            assert torch.equal(weight, torch.full_like(weight, float("norm" in name))), name


def test_the_head_is_the_embedding_unless_untied():
    tied, untied = decoder(), decoder(tie=False)
    assert tied.head.weight is tied.embed.weight
    assert untied.head.weight is not untied.embed.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 50 * 32


def test_every_weight_learns():
    model = MODELS["mixed"]()
    model(torch.randint(0, 50, (2, 9))).y.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_swiglu_by_hand():
    mlp = MLP(1, 1)
    with torch.no_grad():
        for weight, value in zip(mlp.parameters(), (1.0, 2.0, 3.0), strict=True):
            weight.fill_(value)
        # gate 2, up 4, down: silu(2) * 4 * 3
        torch.testing.assert_close(mlp(torch.tensor([2.0])), torch.sigmoid(torch.tensor([2.0])) * 2 * 4 * 3)


def test_wrong_number_of_states():
    with pytest.raises(InputError, match="1 states for 3 blocks"):
        decoder()(torch.tensor([[1]]), [None])
