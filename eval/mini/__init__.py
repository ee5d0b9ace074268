"""The bundled model's held-out scenes and questions, and fixtures of real benchmarks.

Only `held_out` and its types are public; importing this package imports numpy and pillow, not
torch.
"""

from eval.mini.heldout import TEST_SEED, Sample, held_out
from eval.mini.questions import TASKS, Question

NUM_IMAGES = 96
"""Test images of every stored result."""

__all__ = ["NUM_IMAGES", "TASKS", "TEST_SEED", "Question", "Sample", "held_out"]
