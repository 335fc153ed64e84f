"""EfficientDet in pure PyTorch: network, detection, data and training, usable without a cluster."""
