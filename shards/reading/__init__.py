"""How a set becomes pixels on this node."""
