"""Which worker has answered a request, so that feedback on the answer finds it."""

from __future__ import annotations

from collections import OrderedDict

MOST_ANSWERED = 65_536  # requests that are remembered: about 20 MB


class AnsweredRequests:
    """The workers' names by tenant and request id, the newest last. Another gateway has its own."""

    def __init__(self, most: int = MOST_ANSWERED) -> None:
        self._workers: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._most = most

    def add(self, tenant: str, request_id: str, worker: str) -> None:
        """The worker answers the request; the one before it did not end it."""
        self._workers[tenant, request_id] = worker
        self._workers.move_to_end((tenant, request_id))
        if len(self._workers) > self._most:
            self._workers.popitem(last=False)

    def worker(self, tenant: str, request_ids: list[str]) -> str | None:
        """The name of the worker that answered the first of these requests that is known."""
        found = (self._workers.get((tenant, each)) for each in request_ids)
        return next((name for name in found if name is not None), None)
