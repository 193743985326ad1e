"""Find and remember the fastest right configuration of anything: knows callables, configurations and devices."""

from autotune.device import Device, Versions, describe_device, installed_versions
from autotune.entry import Entry, Key, source_hash
from autotune.measure import Clock, EventClock, GraphClock, Times, Timing, WallClock, clock_for, time_together
from autotune.runner import CandidateFailed, DeviceLost, Failure, LocalRunner, Rejected, Runner, Task, TaskError
from autotune.search import Budget, Event, Result, search
from autotune.space import Space, Value
from autotune.store import Found, Merged, Store, StoreWarning, open_store
from autotune.worker import WorkerRunner

__all__ = [
    "Budget",
    "CandidateFailed",
    "Clock",
    "Device",
    "DeviceLost",
    "Entry",
    "Event",
    "EventClock",
    "Failure",
    "Found",
    "GraphClock",
    "Key",
    "LocalRunner",
    "Merged",
    "Rejected",
    "Result",
    "Runner",
    "Space",
    "Store",
    "StoreWarning",
    "Task",
    "TaskError",
    "Times",
    "Timing",
    "Value",
    "Versions",
    "WallClock",
    "WorkerRunner",
    "clock_for",
    "describe_device",
    "installed_versions",
    "open_store",
    "search",
    "source_hash",
    "time_together",
]
