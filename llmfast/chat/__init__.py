"""Chats: messages to a model's own format and back, turn by turn."""
