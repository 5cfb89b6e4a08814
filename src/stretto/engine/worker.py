"""The engine process: loads the models, then runs the engine loop until it is told to stop.

`stretto.engine.process` starts it with an `EngineConfig` (JSON) on standard input. The arguments are the
address to listen at and the descriptor of the socket for heartbeats. It ends when its server does.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import zmq

from stretto.config import EngineConfig
from stretto.disk.files import loading
from stretto.engine import ipc
from stretto.engine.core import EngineCore
from stretto.engine.heartbeat import Pulse
from stretto.engine.runners.factory import ModelLoader, step_limits
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.admission import Snapshot, snapshot
from stretto.engine.sequence import Sequence
from stretto.engine.structured.grammar import Matcher
from stretto.errors import InvalidGrammar, InvalidRequest, StrettoError
from stretto.hardware import process_age
from stretto.queueing.round_robin import RoundRobin
from stretto.telemetry.log import configure
from stretto.telemetry.start_times import StartTimes
from stretto.types import Finish, QueueState, Reason, Request, StepStats, TokenEvent

log = logging.getLogger(__name__)

IDLE_MS = 1000  # the longest wait for a message
QUIET_MS = 200  # without a message, after which a runner may use spare time
COMPILING_MS = 1  # the same while a grammar compiles
HANDLING_S = 0.004  # of messages between two steps
SNAPSHOT_S = 0.02  # between two snapshots of a busy model
PR_SET_PDEATHSIG = 1


class EngineWorker:
    """An engine and its socket. Grammars compile in a thread of their own, so that no step waits for one.

    Loading happens in the constructor. Raises StartError or CheckpointError.
    """

    def __init__(self, config: EngineConfig, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._times = StartTimes()
        self._times.seconds["imports"] = process_age()
        self._loader = ModelLoader(config, self._on_progress, self._times)
        models = self._loader.models()
        limits = step_limits(self._loader.config, models)
        self._tiers = dict(limits.tiers)
        self._infos = [model.info for model in models]
        self._engine = EngineCore(
            models,
            limits=limits,
            schedule=SCHEDULES[config.schedule],
            clock=time.monotonic,
            emit=self._emit,
            share=config.prefix_cache,
        )
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._uncompiled: RoundRobin[Request] = RoundRobin()
        self._compiling: dict[int, tuple[Request | None, Future[Matcher]]] = {}  # one; None: cancelled
        self._admits = config.schedule == "deadline"
        self._newest: dict[str, int] = {}
        self._snapshot_times: dict[str, float] = {}
        self._owes_snapshots = False
        self._queues: dict[str, QueueState] = {}
        self._unprepared = True  # whether a runner could use spare time
        self._stopped = False
        self._checked = True

    def run(self, pulse: Pulse) -> None:
        """Serve until a `Stop` message arrives."""
        self._emit([], None)
        freeze()
        self._send(ipc.Ready(self._infos, self._tiers, self._times.seconds))
        while not self._stopped:
            pulse.turns += 1
            for raw in self._inbox():
                self._handle(raw)
            self._collect_compiled()
            if self._engine.step():
                self._checked = False
            if self._owes_snapshots and (snapshots := self._snapshots()):
                self._send(ipc.StepResult([], None, snapshots))
            self._owes_snapshots = False

    def _inbox(self) -> Iterator[bytes]:
        """The messages that have arrived. Waits for one when there is nothing to run.

        While there is, those that take longer than `HANDLING_S` wait for the next turn: the streams of a busy
        engine do not pause until a burst of requests is over.
        """
        if self._engine.idle:
            waited = self._socket.poll(self._longest_wait_ms())
            if not waited and self._unprepared and not self._compiling:
                self._unprepared = any(model.runner.prepare() for model in self._engine.models.values())
                if not self._unprepared:
                    freeze()
                return
            if not waited and not self._compiling and not self._checked:
                self._engine.check()
                self._checked = True
        until = time.monotonic() + HANDLING_S
        while self._socket.poll(0):
            yield self._socket.recv(zmq.NOBLOCK)
            if time.monotonic() > until and not self._engine.idle:
                return

    def _longest_wait_ms(self) -> int:
        """How long to wait for a message when there is nothing to run."""
        if self._compiling:
            return COMPILING_MS
        return QUIET_MS if self._unprepared else IDLE_MS

    def _handle(self, raw: bytes) -> None:
        """Do what a message asks for. A request that fails ends alone: no exception of it leaves here."""
        try:
            message: ipc.ToEngine = ipc.decode_to_engine(raw)
        except Exception as error:
            self._reject(ipc.sender(raw), error)
            return
        match message:
            case ipc.Submit(request):
                try:
                    self._submit(request)
                except Exception as error:
                    self._reject(request.id, error, request.request_id)
            case ipc.Cancel(ids):
                for ident in ids:
                    self._engine.cancel(ident)
                cancelled = frozenset(ids)
                self._uncompiled.discard(lambda request: request.id in cancelled)
                for ident in cancelled & self._compiling.keys():
                    self._compiling[ident] = None, self._compiling[ident][1]
            case ipc.TurnAway(model, weight, ms):
                self._engine.turn_away(model, weight, ms)
            case ipc.Erase(ident, tenant, subject):
                erased = list(self._engine.erase(tenant, subject))
                blocks, held = (sum(counts) for counts in zip(*erased, strict=True))
                self._send(ipc.Erased(ident, blocks, held))
            case ipc.Stop():
                self._stopped = True

    def _submit(self, request: Request) -> None:
        """Queue a request, or compile its grammar first. Raises InvalidRequest if the model cannot run it."""
        info, grammar = self._engine.models[request.model].runner.info, request.sampling.grammar
        # The server has checked this. A wrong id would fail a step for everybody, so it is checked here too.
        if not 0 < len(request.prompt) <= info.context:
            raise InvalidRequest(
                f"the prompt has {len(request.prompt)} tokens; 1 to {info.context} can be run"
            )
        if min(request.prompt) < 0 or max(request.prompt) >= info.vocab:
            raise InvalidRequest(f"the prompt holds a token id beyond the model's own, 0 to {info.vocab - 1}")
        self._newest[request.model] = request.id
        if grammar is None:
            self._engine.submit(self._sequence(request))
        else:
            matcher = self._loader.grammars(request.model).known(grammar)
            if matcher is not None:
                self._run_under(request, matcher)
                return
            # Our own grammar does not wait behind those of clients, and tenants take turns.
            self._uncompiled.push("" if grammar.kind == "json_object" else request.tenant, request)
            self._compile_next()

    def _compile_next(self) -> None:
        """Compile the next grammar that waits, if none compiles."""
        if self._uncompiled and not self._compiling:
            request = self._uncompiled.pop()
            assert request.sampling.grammar is not None
            compile_ = self._loader.grammars(request.model).compile
            self._compiling[request.id] = request, self._compiler.submit(compile_, request.sampling.grammar)

    def _run_under(self, request: Request, grammar: Matcher) -> None:
        """Queue a request whose grammar has compiled. Raises InvalidGrammar for emitted tokens outside it."""
        if not all(map(grammar.accept, request.emitted)):
            raise InvalidGrammar("the emitted tokens do not follow the grammar")
        self._engine.submit(self._sequence(request, grammar))

    def _reject(self, ident: int | None, error: BaseException, request_id: str = "") -> None:
        """End a request that has not run in an error. Without an id there is nobody to tell."""
        known = isinstance(error, StrettoError)
        if not known:
            log.error("a request was not run", exc_info=error, extra={"request_id": request_id})
        if ident is not None:
            text = error.message if known else f"the engine could not run the request: {type(error).__name__}"
            reason = Reason.INVALID if known and error.status < 500 else Reason.ERROR
            self._emit([TokenEvent(ident, finish=Finish(reason, 0, 0, 0, 0.0, error=text))], None)

    def _collect_compiled(self) -> None:
        """Queue the requests whose grammar has compiled, and end those whose grammar is invalid."""
        for ident, (request, future) in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[ident]
            if request is None:
                continue
            try:
                self._run_under(request, future.result())
            except BaseException as error:  # a panic in the compiler is no Exception
                self._reject(ident, error, request.request_id)
        self._compile_next()

    def _sequence(self, request: Request, grammar: Matcher | None = None) -> Sequence:
        return Sequence.of(request, self._engine.models[request.model].runner.info.context, grammar)

    def _on_progress(self, stage: str, done: int, total: int) -> None:
        self._send(ipc.LoadProgress(stage, done, total))

    def _emit(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        # A first token does not wait for the snapshots.
        self._owes_snapshots = self._admits and any(event.began is not None for event in events)
        snapshots = self._snapshots() if self._admits and not self._owes_snapshots else {}
        self._send(ipc.StepResult(events, stats, snapshots, self._changed_queues(stats)))

    def _changed_queues(self, stats: StepStats | None) -> dict[str, QueueState]:
        """The queues that are not as they were sent last; `stats` tell those of their own model."""
        changed: dict[str, QueueState] = {}
        for name, model in self._engine.models.items():
            queues, pool = model.queues, model.pool
            state = QueueState(len(queues.running), len(queues.waiting), pool.available, pool.total)
            if state != self._queues.get(name):
                self._queues[name] = state
                if stats is None or stats.model != name:
                    changed[name] = state
        return changed

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


def freeze() -> None:
    """Take all objects of now out of the garbage collector's work. They live until the end, and would
    lengthen the pause of each full collection."""
    gc.collect()
    gc.freeze()


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even while it is stopped. Ignore the signals
    that the parent handles."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def main() -> None:
    """Run one engine. Exit code 1: it could not start, and has sent the reason over the socket."""
    end_with_parent()
    pulse = Pulse(int(sys.argv[2]))  # it notices a parent that had ended before
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    configure("engine", config.log_level)
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    try:
        socket.bind(f"ipc://{sys.argv[1]}")
    except zmq.ZMQError as error:
        log.critical("the engine cannot listen at %s: %s", sys.argv[1], error.strerror)
        sys.exit(1)
    try:
        with loading("the engine", "please report this"):
            worker = EngineWorker(config, socket)
    except StrettoError as error:
        socket.send(ipc.encode(ipc.Failed(error.message)))
        socket.close(linger=1000)
        context.term()
        sys.exit(1)
    worker.run(pulse)
    socket.close(linger=100)
    context.term()


if __name__ == "__main__":
    main()
