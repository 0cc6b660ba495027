"""What the bodies of ``ai.sage::Attention`` are built of; ``onnx.body`` puts them together."""
