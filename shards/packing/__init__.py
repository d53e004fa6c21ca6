"""How a source becomes a set."""
