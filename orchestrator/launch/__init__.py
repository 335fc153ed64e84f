"""Who runs it: Ray Train, plain python or torchrun."""
