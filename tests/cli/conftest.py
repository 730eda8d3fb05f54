"""A tiny random model with the reader's tokenizer, and the command line as a function."""

import shutil

import pytest
import torch

from saccade.cli.main import main
from saccade.reader.books import DATA


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    folder = tmp_path_factory.mktemp("tiny")
    logging.disable_progress_bar()
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
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / name, folder / name)
    return str(folder)


@pytest.fixture
def saccade(capsys):
    """saccade("list", "--json") -> (exit code, stdout, stderr)."""

    def run(*argv):
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as stop:  # argparse leaves by itself
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
