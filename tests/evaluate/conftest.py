"""A tiny random model with the reader's tokenizer, loaded."""

import pytest
import torch

from saccade.evaluate.model import Loaded
from saccade.reader import path


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        attn_implementation="sdpa",
    )
    return Loaded("tiny", LlamaForCausalLM(config).eval(), AutoTokenizer.from_pretrained(str(path())))
