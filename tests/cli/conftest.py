"""A tiny random model with the reader's tokenizer, and the command line as a function."""

import pytest
import tiny_model

from saccade.cli.main import main


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("tiny"))


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
