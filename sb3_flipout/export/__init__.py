"""Policies as files that hold no code: tensors as safetensors, and a description as JSON."""

from sb3_flipout.export.policies import export_policy, import_policy

__all__ = ["export_policy", "import_policy"]
