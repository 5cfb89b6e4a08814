"""Stretto: a real-time LLM server."""
