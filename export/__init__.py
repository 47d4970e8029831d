"""From model to ONNX graphs to bundle to engine, each step checked against the one before."""
