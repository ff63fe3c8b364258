"""An engine that computes nothing: answers OpenAI's calls at a set pace, and never is what limits a measurement.

Answers are fixed text, so a token is one event, one word, and counted exactly; a prompt counts a token for every four
bytes it has in the request. What a call asks of the emulator itself is in its body's field `emulate`, which gateways
relay as they do whatever they don't know: `fault` is a fault to meet, `word` the text of each token.
"""

from loadtests.emulator.engine import EngineFault, Pace
from loadtests.emulator.fault import Fault, FaultError, Faults, Kind, rates
from loadtests.emulator.log import Ended, Entry, Log
from loadtests.emulator.server import Emulator, serving

__all__ = [
    "Emulator",
    "Ended",
    "EngineFault",
    "Entry",
    "Fault",
    "FaultError",
    "Faults",
    "Kind",
    "Log",
    "Pace",
    "rates",
    "serving",
]
