"""Evaluation, used from a checkout: ``python -m eval COMMAND``."""
