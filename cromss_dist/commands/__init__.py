"""The commands of `cromss` that are more than one function."""
