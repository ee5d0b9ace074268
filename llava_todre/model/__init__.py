"""LLaVA in the original's terms: images, vision tower, projector, prompts, checkpoints."""
