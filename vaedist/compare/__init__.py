"""Runs beside each other: what differs between their recipes, their numbers, curves and pictures; without torch."""
