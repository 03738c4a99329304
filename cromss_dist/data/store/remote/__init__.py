"""Datasets behind URLs: fetching files, and keeping them on the node."""
