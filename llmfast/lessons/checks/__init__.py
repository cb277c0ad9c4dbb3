"""The judges of exercises, a file a lesson: each takes an answer and says what is wrong with it, or None."""
