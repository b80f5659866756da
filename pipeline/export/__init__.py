"""Exporting a trained student as a bundle: an ONNX model, what it needs to be used, and the proof that it agrees."""
