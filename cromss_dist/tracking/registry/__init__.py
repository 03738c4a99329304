"""The registry of encoders, on MLflow's model registry."""
