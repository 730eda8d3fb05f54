"""Selection for decoding, without training."""
