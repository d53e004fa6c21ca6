"""Attributes added to faces and taken away, and how often a classifier sees that."""
