"""An encoder package: what a registered encoder is."""
