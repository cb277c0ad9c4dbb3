"""Your own documents: an index of them, questions answered from it, and texts shortened."""

from llmfast.retrieval.index import Hit, Index, Report

__all__ = ["Hit", "Index", "Report"]
