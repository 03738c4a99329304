"""From a `Source` to a dataset: plan, parts, resume, append."""
