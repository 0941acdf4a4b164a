"""A student for use elsewhere: ONNX, torch.export, Hugging Face folders."""
