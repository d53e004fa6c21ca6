"""A run's model for use elsewhere: weights, programs and a card."""
