"""ONNX: models with the operator ``ai.sage::Attention``, and ONNX Runtime's operator library."""
