"""``python -m eval bench``: where the time of an answer goes, and how far it is from its limit.

Speed does not depend on the values of weights, so models are built from their dimensions with
random ones (``sizes``), or read from a checkpoint. What is compared takes turns in one process
(``timing``), so that a noisy machine disturbs all alike. ``methods`` splits a whole answer into its
stages, ``parts`` times what pruning adds, ``loads`` the questions of a benchmark; ``bars`` says
which of the project's goals are met.
"""
