"""The engine process: loads the models, then runs the engine loop until it is told to stop.

`stretto.engine.client` starts it with the address of a socket as argument and an `EngineConfig` (JSON) on
standard input. It ends when its parent does.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import zmq

from stretto.config import EngineConfig
from stretto.engine import ipc
from stretto.engine.core import EngineCore
from stretto.engine.runners.factory import ModelLoader, step_limits
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.admission import Snapshot, snapshot
from stretto.engine.sequence import Sequence
from stretto.engine.structured.grammar import Matcher
from stretto.errors import InvalidGrammar, StrettoError
from stretto.types import Finish, Reason, Request, StepStats, TokenEvent

IDLE_MS = 1000  # the longest wait for a message
COMPILING_MS = 1  # the same while a grammar compiles
SNAPSHOT_S = 0.02  # between two snapshots of a busy model
PR_SET_PDEATHSIG = 1


class EngineWorker:
    """An engine and its socket. Grammars compile in a thread of their own, so that no step waits for one.

    Loading happens in the constructor. Raises StartError or CheckpointError.
    """

    def __init__(self, config: EngineConfig, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._loader = ModelLoader(config, self._on_progress)
        models = self._loader.models()
        limits = step_limits(config, models)
        self._infos = [model.info for model in models]
        self._engine = EngineCore(
            models,
            limits=limits,
            schedule=SCHEDULES[config.schedule],
            clock=time.monotonic,
            emit=self._emit,
            share=config.prefix_cache,
        )
        self._compilers = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiling: dict[int, tuple[Request, Future[Matcher]]] = {}
        self._admits = config.schedule == "deadline"
        self._newest: dict[str, int] = {}
        self._snapshot_times: dict[str, float] = {}
        self._stopped = False
        self._checked = True

    def run(self) -> None:
        """Serve until a `Stop` message arrives."""
        self._emit([], None)
        self._send(ipc.Ready(self._infos))
        while not self._stopped:
            for message in self._inbox():
                self._handle(message)
            self._collect_compiled()
            if self._engine.step():
                self._checked = False

    def _inbox(self) -> Iterator[ipc.ToEngine]:
        """The messages that have arrived. Waits for one when there is nothing to run."""
        if self._engine.idle:
            waited = self._socket.poll(COMPILING_MS if self._compiling else IDLE_MS)
            if not waited and not self._compiling and not self._checked:
                self._engine.check()
                self._checked = True
        while self._socket.poll(0):
            yield ipc.decode_to_engine(self._socket.recv(zmq.NOBLOCK))

    def _handle(self, message: ipc.ToEngine) -> None:
        match message:
            case ipc.Submit(request):
                self._newest[request.model] = request.id
                grammar = request.sampling.grammar
                if grammar is None:
                    self._engine.submit(self._sequence(request))
                else:
                    future = self._compilers.submit(self._loader.grammars(request.model).compile, grammar)
                    self._compiling[request.id] = request, future
            case ipc.Cancel(ids):
                for ident in ids:
                    self._compiling.pop(ident, None)
                    self._engine.cancel(ident)
            case ipc.Stop():
                self._stopped = True

    def _collect_compiled(self) -> None:
        """Queue the requests whose grammar has compiled, and end those whose grammar is invalid."""
        for ident, (request, future) in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[ident]
            try:
                grammar = future.result()
                if not all(map(grammar.accept, request.emitted)):
                    raise InvalidGrammar("the emitted tokens do not follow the grammar")
                self._engine.submit(self._sequence(request, grammar))
            except StrettoError as error:
                finish = Finish(Reason.ERROR, len(request.prompt), 0, 0, 0.0, error=error.message)
                self._emit([TokenEvent(ident, finish=finish)], None)

    def _sequence(self, request: Request, grammar: Matcher | None = None) -> Sequence:
        return Sequence.of(request, self._engine.models[request.model].runner.info.context, grammar)

    def _on_progress(self, stage: str, done: int, total: int) -> None:
        self._send(ipc.LoadProgress(stage, done, total))

    def _emit(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        self._send(ipc.StepResult(events, stats, self._snapshots() if self._admits else {}))

    def _snapshots(self) -> dict[str, Snapshot]:
        """The state of each idle model, and of each busy one whose last snapshot is older than SNAPSHOT_S."""
        now = time.monotonic()
        found: dict[str, Snapshot] = {}
        for name, model in self._engine.models.items():
            if now >= self._snapshot_times.get(name, 0.0) + SNAPSHOT_S or not model.busy:
                self._snapshot_times[name] = now
                found[name] = snapshot(self._engine.context(name), self._newest.get(name, 0))
        return found

    def _send(self, message: ipc.FromEngine) -> None:
        self._socket.send(ipc.encode(message))


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; ignore the signals that the parent handles."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent process has ended")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def main() -> None:
    """Run one engine. Exit code 1: it could not start, and has sent the reason over the socket."""
    end_with_parent()
    logging.basicConfig(format="%(asctime)s engine %(levelname)s %(message)s")
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(sys.argv[1])
    try:
        worker = EngineWorker(config, socket)
    except StrettoError as error:
        socket.send(ipc.encode(ipc.Failed(error.message)))
        socket.close(linger=1000)
        context.term()
        sys.exit(1)
    worker.run()
    socket.close(linger=100)
    context.term()


if __name__ == "__main__":
    main()
