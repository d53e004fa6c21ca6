"""Tars that somebody else has made: how they become a set."""
