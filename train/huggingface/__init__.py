"""Models to and from the files that Hugging Face's `transformers` reads."""

from train.huggingface.export import export_run
from train.huggingface.imports import import_model

__all__ = ["export_run", "import_model"]
