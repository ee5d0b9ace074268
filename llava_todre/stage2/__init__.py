"""Stage 2: dropping tokens between decoder layers, and the KV cache that goes with it."""

import transformers

from llava_todre.stage2.cache import PrunedCache
from llava_todre.stage2.segment import LayerInputs
from llava_todre.stage2.state import DecoderPruning
from llava_todre.stage2.supported import check_transformers

__all__ = ["DecoderPruning", "LayerInputs", "PrunedCache"]

check_transformers(transformers.__version__)
