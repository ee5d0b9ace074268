"""Dropping tokens between decoder layers."""

import transformers

from llava_todre.withdrawal.segment import LayerInputs
from llava_todre.withdrawal.stage import Withdrawal
from llava_todre.withdrawal.supported import check_transformers

__all__ = ["LayerInputs", "Withdrawal"]

check_transformers(transformers.__version__)
