"""How the reader was made: tokenizer, training data, trainer, export, acceptance test, fitted plans."""
