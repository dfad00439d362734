"""Policies as files: without code, as safetensors and JSON, or as ONNX."""

from sb3_flipout.export.onnx import export_onnx, graph_of
from sb3_flipout.export.policies import export_policy, import_policy

__all__ = ["export_onnx", "export_policy", "graph_of", "import_policy"]
