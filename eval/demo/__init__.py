"""What pruning costs in accuracy and saves in work, on the bundled model: ``todre demo``."""
