"""The layers with weights learn: associative recall, where a window of equal cost does not see far enough."""

import pytest
import torch
from torch.nn import functional as F

from saccade.core.pattern import Window
from saccade.evaluate.tasks.recall import IGNORE, recall_batch
from saccade.kernels.attend import attend
from saccade.methods.linear.lightning import LightningAttention
from saccade.methods.sparse.routing import RoutingAttention
from saccade.nn import Attention, Transformer

LENGTH, PAIRS, VOCAB = 32, 3, 12
# 2 clusters of 16 and 3 tokens nearby: 2 * 136 / 32 + 2.9 + 2 centroids over two halves of heads, under 7 a row
CLUSTERS, MEMBERS, NEAR, WINDOW = 2, 16, 3, 8
BATCH, RATE = 32, 3e-3


class Nearby(Attention):
    """The window of equal cost."""

    def attend(self, q, k, v):
        return attend(q, k, v, Window(0, WINDOW), lse=False).o


def mixer(kind, layer):
    if kind == "lightning":
        return LightningAttention(64, 4, layer, layers=2)
    if kind == "routing":
        return RoutingAttention(64, 4, CLUSTERS, MEMBERS, NEAR, ema=0.99)
    return Nearby(64, 4, rope_base=10_000.0)


def shares(model, batch, rng):
    """Logits, right answers and the layers' loss for one batch."""
    ids, labels = recall_batch(batch, LENGTH, PAIRS, VOCAB, rng, power=4.0)  # asked far behind
    out, asked = model.hidden(ids), labels != IGNORE
    return model.head(out.y[asked]), labels[asked], out.loss


def learn(kind, steps=800, enough=0.8):
    """Share of right answers in 500 new sequences, after training until `enough` or for `steps`."""
    torch.manual_seed(0)
    model = Transformer(VOCAB, 64, [mixer(kind, i) for i in range(2)], mlp_width=64)
    with torch.no_grad():
        for p in model.parameters():
            # std 0.02 is for wide models
            p.mul_(5.0 if p.ndim == 2 else 1.0)
    before = [m.layer.centroids.clone() for m in model.blocks if kind == "routing"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.98))
    rng, seen = torch.Generator().manual_seed(3), 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 60)
        logits, want, own = shares(model, BATCH, rng)
        loss = F.cross_entropy(logits, want)
        optimizer.zero_grad()
        (loss if own is None else loss + own).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen = 0.97 * seen + 0.03 * (logits.argmax(-1) == want).float().mean().item()
        if seen > enough:
            break
    after = [m.layer.centroids for m in model.blocks if kind == "routing"]
    assert all(not torch.allclose(a, b, atol=0.1) for a, b in zip(before, after, strict=True))
    model.eval()
    with torch.no_grad():
        logits, want, _ = shares(model, 500, torch.Generator().manual_seed(4))
    return (logits.argmax(-1) == want).float().mean().item()


@pytest.mark.slow
def test_routing_and_lightning_recall_what_a_window_cannot_see():
    near = learn("window")
    assert near < 0.3
    assert learn("routing") > near + 0.4
    assert learn("lightning") > near + 0.4
