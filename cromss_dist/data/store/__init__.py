"""What is stored: shards, the cube, and how they are read and verified."""
