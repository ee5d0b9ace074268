"""Dropping tokens between decoder layers."""

import transformers

from llava_todre.stage2.segment import LayerInputs
from llava_todre.stage2.state import DecoderPruning
from llava_todre.stage2.supported import check_transformers

__all__ = ["LayerInputs", "DecoderPruning"]

check_transformers(transformers.__version__)
