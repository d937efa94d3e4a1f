"""Compiled steps: dispatch, fusion of many steps into one call, and the cost of a program."""

from trainer.compile.dispatch import CompiledStep as CompiledStep
from trainer.compile.fusion import FusionPolicy as FusionPolicy
from trainer.compile.cost import ProgramCost as ProgramCost
from trainer.compile.planning import plan as plan
