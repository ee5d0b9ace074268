"""The papers' figures, drawn from stored results and from live runs of the bundled model.

Every figure is two functions: ``gather`` collects plain numbers, ``draw`` makes a matplotlib Figure
of them. :data:`eval.figures.registry.FIGURES` lists them.
"""
