"""Your own documents: an index of them, questions answered from it, and texts shortened."""

from llmfast.retrieval.answering import Answer, Questions, ask
from llmfast.retrieval.index import Hit, Index, Report
from llmfast.retrieval.summarizing import summarize

__all__ = ["Answer", "Hit", "Index", "Questions", "Report", "ask", "summarize"]
