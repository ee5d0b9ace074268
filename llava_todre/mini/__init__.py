"""A mini LLaVA-NeXT on drawn scenes: data, questions and training of the bundled checkpoint.

Only `held_out` and its types are public; importing this package imports numpy and pillow, not
torch.
"""

from llava_todre.mini.heldout import TEST_SEED, Sample, held_out
from llava_todre.mini.questions import TASKS, Question

NUM_IMAGES = 96
"""Test pictures behind every stored result."""

__all__ = ["NUM_IMAGES", "TASKS", "TEST_SEED", "Question", "Sample", "held_out"]
