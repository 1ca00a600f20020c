"""First come, first served; the last admitted request is preempted."""

from __future__ import annotations

from typing import ClassVar

from nanoengine.api import Policy


class FCFS(Policy):
    by_arrival: ClassVar[bool] = True
