"""Stored results: read, checked, compared, averaged; published numbers."""
