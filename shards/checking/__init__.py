"""Whether a set is what its manifest says, and making it so again."""
