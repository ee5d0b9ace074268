"""Data drawn on the spot: held-out scenes of the bundled model, fixtures of real benchmarks."""
