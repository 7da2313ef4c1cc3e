"""Turn a checkpoint into a bundle of per-segment ONNX graphs, and check the one against the other."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read by onnxruntime when it is imported, so before that
