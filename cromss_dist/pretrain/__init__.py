"""Pretraining: what the training loop asks of this task, and the encoders that a run of it leaves."""
