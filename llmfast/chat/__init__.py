"""Chats: messages to a model's own format and back, turn by turn."""

from llmfast.chat.conversation import Conversation, Reply
from llmfast.chat.template import ChatTemplate

__all__ = ["ChatTemplate", "Conversation", "Reply"]
