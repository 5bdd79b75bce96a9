"""Conversations: from rows in any of the usual shapes to windows with a mark on every token that trains."""
