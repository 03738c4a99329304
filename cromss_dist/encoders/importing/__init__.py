"""Published checkpoints of other people as encoder packages, without running anything of them."""
