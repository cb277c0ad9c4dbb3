"""What the notebooks of `lessons/` import: exercises that are checked, numbers that are held, a text, pictures."""

from llmfast.lessons.checking import check, confirm
from llmfast.lessons.material import corpus, effort

__all__ = ["check", "confirm", "corpus", "effort"]
