"""Where samples come from: COCO index, transforms, sampler, loader, the demo set."""
