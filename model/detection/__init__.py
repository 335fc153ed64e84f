"""What boxes are: anchors, matching, losses, post-processing."""
