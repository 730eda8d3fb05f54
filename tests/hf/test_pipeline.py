"""transformers' own text-generation pipeline and generate on an attached model."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from saccade import Plan, attach
from saccade.core.errors import InputError
from saccade.reader import path

TEXTS = ["the old house by the river was empty and nobody had seen the boat since the storm of that winter", "one two"]
GREEDY = dict(max_new_tokens=8, do_sample=False)
NEAR = ("streaming", {"sink": 2, "recent": 6})


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        # so large that what is read changes what is said
        initializer_range=0.3,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(path()), padding_side="left")
    return pipeline("text-generation", model=LlamaForCausalLM(config).eval(), tokenizer=tokenizer, device="cpu")


def said(pipe, texts=TEXTS, **more):
    """What the pipeline adds to each text; the batch is ragged, so that the shorter text is padded."""
    found = pipe(texts, batch_size=len(texts), return_full_text=False, **GREEDY, **more)
    return [row[0]["generated_text"] for row in found]


def test_a_dense_plan_says_what_the_model_says(pipe):
    want = said(pipe)
    assert len(set(want)) == 2
    with attach(pipe.model, Plan.uniform(pipe.model)) as session:
        assert said(pipe) == want
        assert said(pipe, past_key_values=session.cache()) == want
        assert pipe(TEXTS[0], num_beams=2, return_full_text=False, **GREEDY, past_key_values=session.cache())
        assert {way for way, _ in session.ways} == {"other cache", "store"}
    assert said(pipe) == want


@pytest.mark.parametrize("phases", [{"prefill": NEAR, "decode": NEAR}, {"cache": ("duo", NEAR[1])}])
def test_a_sparse_plan_says_what_generate_says(pipe, phases):
    dense = said(pipe)
    with attach(pipe.model, Plan.uniform(pipe.model, **phases)) as session:
        found = said(pipe, past_key_values=session.cache())
        for text, got in zip(TEXTS, found, strict=True):
            ids = pipe.tokenizer(text, return_tensors="pt")["input_ids"]
            alone = pipe.model.generate(ids, past_key_values=session.cache(), **GREEDY)
            assert got == pipe.tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
        if "cache" in phases:
            with pytest.raises(InputError, match=r"session\.cache\(\)"):
                said(pipe)
        else:
            assert said(pipe) == found
    assert found[0] != dense[0] and said(pipe) == dense
