"""A tiny random Llama with the reader's vocabulary: its config, the model, and a folder that can be loaded."""

import shutil

import torch

from saccade.reader.books import DATA


def config(**changes):
    """The config, with what a test needs otherwise."""
    from transformers import LlamaConfig

    usual = dict(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=8)
    usual |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    usual |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return LlamaConfig(**usual | changes)


def model(**changes):
    """The model, the same weights each time."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(config(**changes)).eval()


def save(folder, **changes):
    """Write the model and the reader's tokenizer; gives the folder's name."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model(**changes).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / name, folder / name)
    return str(folder)
