from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI

from tests.server.conftest import Served


@pytest.fixture
async def ai(served: Served) -> AsyncIterator[AsyncOpenAI]:
    """The `openai` client, unchanged, of a real server with the fake engine."""
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client
