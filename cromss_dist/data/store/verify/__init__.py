"""Whether a stored dataset is what its manifest says, to the last pixel."""
