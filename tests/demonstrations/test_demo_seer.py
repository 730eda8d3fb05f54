"""What a quarter of the pairs costs the reader on a book: a trained gate, means, a window and lot, and the true blocks.

SeerAttention claims that its gate comes close to the true blocks, MInference that a dynamic pattern costs little.
"""

import pytest
import torch
from torch.nn import functional as F

from saccade.core.plan import ModelShape, Plan
from saccade.evaluate.presets import preset
from saccade.hf.attach import attach
from saccade.hf.meter import Meter
from saccade.reader import load
from saccade.reader.books import HELD_OUT, held_out

LENGTH, ASKED, SHARE = 2048, 1024, 0.14  # a share of all keys: about a quarter of the causal pairs


@pytest.mark.slow
def test_kept_weight_and_perplexity_at_a_quarter_of_the_pairs():
    reader, tokenizer = load()
    shape = ModelShape.of(reader)
    ids = torch.tensor([tokenizer(held_out(HELD_OUT[1])[300_000 : 300_000 + 6 * LENGTH])["input_ids"][: LENGTH + 1]])
    gate = preset("seer", reader, LENGTH, bundled=True).layers[0][0].args["weights"]
    loss, kept, cost = {}, {}, {}
    for name, args in {
        "dense": {},
        "seer": {"weights": gate, "budget": SHARE, "tail": 0},
        "pooled": {"budget": SHARE},
        "random": {"budget": SHARE},
        "oracle": {"budget": SHARE},
        "streaming": {"sink": 64, "recent": int(SHARE * LENGTH) - 64},
        "minference": {"columns": 160, "diagonals": 102},
    }.items():
        meter = Meter()
        with attach(reader, Plan.uniform(shape, prefill=(name, args))) as session, torch.inference_mode():
            session.watch = meter
            logits = reader(ids[:, :-1], past_key_values=session.cache()).logits[0, -ASKED:]
        loss[name] = float(F.cross_entropy(logits, ids[0, -ASKED:]))
        kept[name], cost[name] = meter.kept("prefill"), meter.density("prefill")
    # the true blocks' density counts the dense map that they are chosen from
    cost["oracle"] -= 1
    fixed = [cost[name] for name in ("seer", "pooled", "random", "oracle", "streaming")]
    assert max(fixed) < 1.05 * min(fixed) and cost["minference"] < max(fixed)
    # measured 0.72 and 0.73, against 0.69 and 0.47
    assert kept["oracle"] > kept["seer"] > kept["pooled"] > kept["random"] + 0.1
    assert kept["seer"] > 0.94 * kept["oracle"]
    # measured, in nats above dense: 0.17 seer, 0.09 pooled, 0.12 window, 0.18 minference,
    # 0.07 true blocks, 0.69 random
    assert loss["dense"] < loss["oracle"] < min(loss[name] for name in ("seer", "pooled", "streaming", "minference"))
    assert max(loss[name] for name in ("seer", "pooled", "streaming", "minference")) < loss["random"] - 0.2
