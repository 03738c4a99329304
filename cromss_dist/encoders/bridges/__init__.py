"""Bridges: a pretrained encoder in the libraries that people use already.

timm and segmentation-models-pytorch are methods of `PretrainedEncoder`; each other library has a file here.
"""
