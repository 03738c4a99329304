"""A look at the noise: which labels a pretrained segmenter doubts, what it suggests instead, how well that finds the truth."""
