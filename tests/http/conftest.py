"""The fixtures of the API server's tests, whose application is tested here through its HTTP layer."""

from tests.server.conftest import app, checkpoint, client, config, engine, served, set_answer, text

__all__ = ["app", "checkpoint", "client", "config", "engine", "served", "set_answer", "text"]
