"""Encoders made ready for others: a folder for a model hub, a STAC item, a weights file as TorchGeo keeps them."""
