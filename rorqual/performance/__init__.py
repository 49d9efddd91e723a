"""What a step should take: a roofline model of prefill and decode, corrected by what workers measure. Pure.

Owns the table of accelerators (`hardware`), what a model costs to compute and to move (`costs`), predicted times
(`roofline`), their correction by measurements (`correction`), and what reading kept state costs beside computing it
(`sources`). Called by the router's placement, by workers and by the simulation of `rorqual bench route`. Reads no
clock; never imports torch.
"""

from rorqual.performance.correction import Corrections
from rorqual.performance.costs import FLASH, PRESETS, PRO, ModelCosts, model_costs
from rorqual.performance.hardware import HARDWARE, Hardware
from rorqual.performance.roofline import STORE_SPEED, Efficiency, PerformanceModel
from rorqual.performance.sources import MeasuredSpeed, SourceSpeed

__all__ = [
    "FLASH",
    "HARDWARE",
    "PRESETS",
    "PRO",
    "STORE_SPEED",
    "Corrections",
    "Efficiency",
    "Hardware",
    "MeasuredSpeed",
    "ModelCosts",
    "PerformanceModel",
    "SourceSpeed",
    "model_costs",
]
