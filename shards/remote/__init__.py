"""How files come from elsewhere, once a node."""
