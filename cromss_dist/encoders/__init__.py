"""Pretrained encoders for downstream work: loaded, handed to other libraries, imported, published."""
