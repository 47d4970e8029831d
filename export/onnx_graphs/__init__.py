"""From a traced module to the ONNX file of a bundle."""
