"""What is in a dataset: quality, pictures, report."""
