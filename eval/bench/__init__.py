"""``python -m eval bench``: where the time of an answer goes, and how far it is from its limit.

Speed does not depend on the values of weights, so models are built from their dimensions with
random ones (``dims``), or read from a checkpoint. What is compared takes turns in one process
(``timing``), so that a noisy machine disturbs all alike. ``methods`` splits a whole answer into its
stages, ``overhead`` times what pruning adds, ``throughput`` the questions of a benchmark;
``targets`` says which of the project's goals are met.
"""
