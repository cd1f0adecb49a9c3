"""Checkpoints that AWQ, GPTQ or compressed-tensors quantised, read from their safetensors files."""

from eepass.checkpoints.formats.folder import load_quantized, quantization_config

__all__ = ["load_quantized", "quantization_config"]
