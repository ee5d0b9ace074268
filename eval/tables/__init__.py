"""Tables filled from stored results, and how they are printed."""
