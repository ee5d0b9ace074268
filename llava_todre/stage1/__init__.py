"""Stage 1: dropping visual tokens before the decoder, for our class and for stock models.

In the order of a prompt: ``anyres`` (crops and newlines), ``layout`` (where the tokens of an image
stand), ``select`` (what a method keeps of each image), ``pack`` (kept tokens and text, as a batch).
"""
