"""LLaVA in the original's terms: images, vision tower, merging, decoder, loading."""
