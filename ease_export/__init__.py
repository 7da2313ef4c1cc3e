"""Turn a checkpoint into a bundle of per-segment ONNX graphs, and check the one against the other."""
