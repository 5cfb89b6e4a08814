"""Decides what the next step of a model runs. Pure: it changes no sequence, no queue and no block."""

from stretto.engine.scheduler.deadline import deadline as _deadline
from stretto.engine.scheduler.fcfs import fcfs as _fcfs
from stretto.engine.scheduler.types import SchedulePolicy

SCHEDULES: dict[str, SchedulePolicy] = {"fcfs": _fcfs, "deadline": _deadline}
