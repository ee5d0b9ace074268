"""Dropping tokens between decoder layers."""

from llava_todre.withdrawal.segment import LayerInputs
from llava_todre.withdrawal.stage import Withdrawal

__all__ = ["LayerInputs", "Withdrawal"]
