"""What a sharded attention will cost: every rank's and hop's time, waiting and memory, from measured figures."""

from ringfa3.cost.choice import LAYOUTS, Choice, recommend
from ringfa3.cost.job import TRANSPORTS, Job, Way
from ringfa3.cost.machine import Link, Machine
from ringfa3.cost.predict import Prediction, hiding_tokens, predict
from ringfa3.cost.schedule import Copy, Step

__all__ = [
    "LAYOUTS",
    "TRANSPORTS",
    "Choice",
    "Copy",
    "Job",
    "Link",
    "Machine",
    "Prediction",
    "Step",
    "Way",
    "hiding_tokens",
    "predict",
    "recommend",
]
