"""Detectors as files that run without this code: ONNX, TorchScript, torch.export."""
