"""How files lie in an archive, as a YAML description says it."""
