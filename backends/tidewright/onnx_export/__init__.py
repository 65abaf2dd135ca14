"""Any supported model as an ONNX file with its KV cache as inputs and outputs: what the fallback runs."""
