"""Plug into Hugging Face transformers through its public hooks: attach, interface, serve, cache, doctor."""
