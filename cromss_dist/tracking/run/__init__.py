"""A run: its spool on disk, and how that reaches MLflow."""
