"""Selection for prefill, without training."""
