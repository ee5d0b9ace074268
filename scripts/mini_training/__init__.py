"""Training of the bundled model, a mini LLaVA-NeXT on drawn scenes: see ``train``."""
