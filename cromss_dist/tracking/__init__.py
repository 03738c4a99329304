"""Runs and encoders: MLflow tracking, encoder packages, the registry, prediction panels."""
