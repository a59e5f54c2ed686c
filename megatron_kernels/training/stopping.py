"""SIGTERM and Ctrl-C: the iteration is finished and saved before the run ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Stop:
    """Inside, the signals set `signal` instead of ending the process.

    A second Ctrl-C does what it would have done. Further SIGTERMs do nothing: torchrun and a batch system may both send one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            signal.signal(number, self._before[number])
            raise KeyboardInterrupt
        self.signal = self.signal or number
