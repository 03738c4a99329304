"""The cube: its metadata and chunks, how it is written, recorded and read."""
