"""Plug into Hugging Face transformers through its public hooks: attach, cache, mask, doctor."""
