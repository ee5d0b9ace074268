"""Evaluation, used from a checkout: ``python -m eval COMMAND``."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""
