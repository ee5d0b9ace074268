"""A report one can open: results, figures, answers and pictures in one HTML file."""
