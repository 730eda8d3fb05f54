"""Distilling a gate: the ground truth in loops, a loss that is 0 when equal, frozen weights, learned beats pooled."""

import math

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from saccade import attach
from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.plan import Plan
from saccade.core.rope import Rope
from saccade.evaluate.presets import preset
from saccade.evaluate.tasks.needle import Needle
from saccade.fit import seer
from saccade.fit.seer import block_maxima, divergence, fit_gate, lessons_of
from saccade.hf.meter import Meter
from saccade.kernels.gate import gate_keys, gate_scores
from saccade.methods.gates import PACKAGE
from saccade.reader import load


@pytest.fixture(autouse=True)
def gradients():
    """Another test may have left gradients off."""
    with torch.enable_grad():
        yield


@pytest.mark.parametrize(("N", "block"), [(128, 64), (130, 64), (50, 16), (16, 16), (9, 4)])
@pytest.mark.parametrize("tile", [1, 1 << 22])
def test_ground_truth_against_a_loop(N, block, tile, monkeypatch):
    monkeypatch.setattr(seer, "TILE", tile)
    q, k = torch.randn(2, 4, N, 6, dtype=torch.float64), torch.randn(2, 2, N, 6, dtype=torch.float64)
    got = block_maxima(q, k, Call.of(q, k, scale=0.7), block)
    n = -(-N // block)
    assert got.shape == (2, 4, n, n)
    for b in range(2):
        for h in range(4):
            want = [[0.0] * n for _ in range(n)]
            for i in range(N):
                p = torch.softmax(0.7 * k[b, h // 2, : i + 1] @ q[b, h, i], 0).tolist()
                for j, x in enumerate(p):
                    want[i // block][j // block] = max(want[i // block][j // block], x)
            want = [[x / sum(row) for x in row] for row in want]
            torch.testing.assert_close(got[b, h], torch.tensor(want, dtype=torch.float64), atol=1e-10, rtol=1e-8)
    assert not got.triu(1).any()
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))


def test_divergence_against_a_loop_and_zero_only_when_equal():
    scores = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    ahead = torch.ones(8, 8, dtype=torch.bool).triu(1)
    equal = scores.detach().masked_fill(ahead, float("-inf")).softmax(-1)
    assert abs(float(divergence(scores.detach(), equal, 0.0))) < 1e-12
    target = torch.rand(2, 3, 8, 8, dtype=torch.float64).tril()
    target[:, :, :, 0] = 0.0
    target[:, :, 0, 0] = 1.0
    target /= target.sum(-1, keepdim=True)
    loss = divergence(scores, target)
    want, plain = 0.0, scores.detach()
    for b in range(2):
        for h in range(3):
            for i in range(2, 8):  # the first quarter is dropped
                total = sum(math.exp(plain[b, h, i, j]) for j in range(i + 1))
                for j in range(i + 1):
                    a = float(target[b, h, i, j])
                    want += a * (math.log(a) - float(plain[b, h, i, j]) + math.log(total)) if a else 0.0
    assert abs(float(loss.detach()) - want / (2 * 3 * 6)) < 1e-10 and want > 0.1
    loss.backward()
    assert scores.grad.isfinite().all() and not scores.grad[:, :, :2].any() and not scores.grad.triu(1).any()
    # a row that differs in one block only
    off = equal.clone()
    off[0, 0, 7, 0] += 1e-3
    off[0, 0, 7, 1] -= 1e-3
    assert float(divergence(scores.detach(), off, 0.0)) > 0


@pytest.fixture(scope="module")
def model():
    """Random weights, but queries and keys so large that attention is on a few keys, as in a trained model."""
    torch.manual_seed(0)
    config = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=90)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**config, num_key_value_heads=2, rope_theta=1e6)).eval()
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            part.weight.data *= 25
    return model


def texts(count, N=256, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 90, (N,), generator=rng) for _ in range(count)]


def recall(scores, truth, count):
    """The share of the truth that lies in the best blocks of each row, the own one always among them."""
    n = truth.shape[3]
    scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
    scores = scores.masked_fill(torch.eye(n, dtype=torch.bool), float("inf"))
    kept = truth.gather(3, scores.topk(count, -1).indices).sum(-1)
    return float(kept[:, :, count:].mean())


@pytest.fixture(scope="module")
def marked():
    """A model whose heads look for marks: a token of one colour attends to earlier marks of another.

    A mark stands alone in a block of fillers, whose keys resemble marks a little and all alike: their mean hides it.
    """
    torch.manual_seed(0)
    config = dict(hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, vocab_size=90)
    # of each head's four pairs of channels all but the first hardly turn
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**config, num_key_value_heads=2, rope_theta=1e12)).eval()
    channels, table = torch.tensor([1, 2, 3, 5, 6, 7]), torch.zeros(90, 32)
    fillers, marks = torch.arange(60), torch.arange(60, 90)
    table[fillers, fillers // 10] = 1.0
    table[fillers, 12 + (fillers // 10 + 1) % 6] = 1.0
    table[marks, 6 + marks % 6] = 1.0
    table[:, 18:] = 0.05 * torch.randn(90, 14)
    q, k = torch.zeros(4, 8, 32), torch.zeros(2, 8, 32)
    for head in q:
        head[channels[torch.randperm(6)], torch.arange(6)] = 3.0
    for head in k:
        order = channels[torch.randperm(6)]
        head[order, 6 + torch.arange(6)] = 2.5
        head[order, 12 + torch.arange(6)] = 0.8
    layer = model.model.layers[0]
    for part, weight in ((layer.self_attn.q_proj, q), (layer.self_attn.k_proj, k)):
        part.weight.data.copy_(weight.flatten(0, 1))
    model.model.embed_tokens.weight.data.copy_(table)
    return model


def marked_texts(count, seed=0, blocks=32):
    """Blocks of 8 fillers of one colour; in every second one a mark."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 6, (blocks, 1), generator=rng) * 10 + torch.randint(0, 10, (blocks, 8), generator=rng)
        at = torch.randint(0, 8, (blocks,), generator=rng)
        mark = torch.randint(60, 90, (blocks,), generator=rng)
        ids[::2].scatter_(1, at[::2, None], mark[::2, None])
        found.append(ids.flatten())
    return found


def test_learned_beats_pooled_and_comes_close_to_the_truth(marked, tmp_path):
    losses = []
    gates = fit_gate(
        marked,
        marked_texts(12),
        tmp_path / "g",
        block=8,
        epochs=20,
        lr=0.03,
        progress=lambda _, loss: losses.append(loss),
    )
    assert len(losses) == 240 and losses[-1] < 0.5 * losses[0]
    sums = dict.fromkeys(("random", "pooled", "learned", "oracle"), 0.0)
    plain = torch.cat((torch.zeros(16, 8), torch.eye(8))).repeat(4, 1, 1)
    for ids in marked_texts(4, seed=1):
        (lesson,) = lessons_of(marked, ids, 8)
        scores = {"random": torch.rand_like(lesson.target), "oracle": lesson.target}
        for name, weight in (("pooled", plain), ("learned", gates[0])):
            scores[name] = gate_scores(lesson.asked, gate_keys(lesson.features, weight, 8, lesson.rope))
        for name, found in scores.items():
            sums[name] += recall(found, lesson.target, 4) / 4
    # of what the best four blocks of a row hold; measured 0.27, 0.49, 0.92, 0.93
    assert sums["learned"] > sums["pooled"] + 0.3, sums
    assert sums["oracle"] - sums["learned"] < 0.25 * (sums["oracle"] - sums["pooled"]), sums


def test_the_model_is_as_before_and_has_no_gradients(model, tmp_path):
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    gates = fit_gate(model, texts(2, N=70), tmp_path / "g", block=16)
    assert model.training and model.config._attn_implementation == "sdpa"
    model.eval()
    for name, p in model.named_parameters():
        assert p.grad is None and p.requires_grad and torch.equal(p, before[name])
    assert [g.shape for g in gates] == [(4, 24, 8)] * 2 and not any(g.requires_grad for g in gates)


def test_a_saved_gate_serves_in_a_plan(model, tmp_path):
    fit_gate(model, texts(2), tmp_path / "g", block=16)
    plan = Plan.uniform(model, prefill=("seer", {"weights": str(tmp_path / "g"), "budget": 64}))
    meter = Meter()
    with attach(model, plan) as session, torch.no_grad():
        session.watch = meter
        cache = session.cache()
        model(texts(1, N=400, seed=3)[0][None], past_key_values=cache)
        model(torch.tensor([[5]]), past_key_values=cache)
    assert 0.2 < meter.density("prefill") < 0.6
    assert meter.density("decode") == 1.0


def test_epochs_read_samples_once_and_steps_are_counted(model, tmp_path):
    read, steps = [], []

    def samples():
        for ids in texts(9, N=64):
            read.append(1)
            yield ids

    fit_gate(
        model, samples(), tmp_path / "g", block=16, steps=3, epochs=2, progress=lambda step, loss: steps.append(step)
    )
    assert len(read) == 3 and steps == list(range(6))
    one, two = (fit_gate(model, texts(3, N=64), tmp_path / "g", block=16, epochs=2, seed=s) for s in (1, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_rows_of_a_batch_are_read_alike(model):
    ids = torch.stack(texts(2, N=90))
    both = lessons_of(model, ids, 16)
    for row in range(2):
        for alone, lesson in zip(lessons_of(model, ids[row], 16), both, strict=True):
            for got, want in zip(lesson[:3], alone[:3], strict=True):
                torch.testing.assert_close(got[row], want[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"samples": []}, "needs samples"),
        ({"samples": iter([])}, "give steps"),
        ({"samples": iter([]), "steps": 2}, "0 samples"),
        ({"samples": [torch.zeros(16, dtype=torch.long)]}, "longer than 16"),
        ({"drop": 1.0}, "drop"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_bad_requests(model, tmp_path, given, says):
    with pytest.raises(InputError, match=says):
        fit_gate(model, **{"samples": texts(1, N=64), "path": tmp_path / "g", "block": 16, **given})
    assert not (tmp_path / "g").exists()


def test_models_without_rotary_positions_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr("saccade.hf.attach.rope_of", lambda *args: None)
    with pytest.raises(UnsupportedError, match="rotates"):
        fit_gate(model, texts(1, N=64), tmp_path / "g", block=16)


def test_the_rope_is_the_models_own(model):
    lesson = lessons_of(model, texts(1, N=64)[0], 16)[0]
    assert isinstance(lesson.rope, Rope) and lesson.rope.frequencies.shape == (4,)


def test_the_readers_gate_beats_mean_pooling_on_a_book_it_has_not_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader, tokenizer = load()
    plan = preset("seer", reader, 2048, bundled=True)
    (assign,) = plan.layers[7]
    weights = assign.args["weights"]
    assert weights.startswith("saccade:") and assign.build().weights_for == (8, 4, 64)
    tensors = load_file(PACKAGE / weights.removeprefix("saccade:"))
    ids = torch.tensor(Needle(distractors=10).sample(tokenizer, 1536, 0).ids)
    plain = torch.cat((torch.zeros(128, 64), torch.eye(64))).repeat(4, 1, 1)
    sums = dict.fromkeys(("pooled", "learned", "oracle"), 0.0)
    for layer, lesson in enumerate(lessons_of(reader, ids, 64)):
        scores = {"oracle": lesson.target}
        for name, weight in (("pooled", plain), ("learned", tensors[f"layers.{layer}.key"])):
            scores[name] = gate_scores(lesson.asked, gate_keys(lesson.features, weight, 64, lesson.rope))
        for name, found in scores.items():
            sums[name] += recall(found, lesson.target, 4) / 8
    assert sums["learned"] > sums["pooled"] + 0.05, sums
    assert sums["oracle"] - sums["learned"] < 0.5 * (sums["oracle"] - sums["pooled"]), sums
