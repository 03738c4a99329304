"""What a run will take, before it starts: a measured machine, and a model of a training step. Formulas: docs/scaling.md."""
