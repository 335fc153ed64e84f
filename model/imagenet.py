"""Colour statistics of ImageNet, which every pretrained backbone expects. Values in 0..1, RGB."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
