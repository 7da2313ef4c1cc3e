"""ONNX Runtime: devices, buffers, sessions, and the stack of graphs that the engine drives."""
