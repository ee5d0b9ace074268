"""Pages of docs/ and parts of the README that are generated from results."""
