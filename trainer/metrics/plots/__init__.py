"""Plots of run histories: as a matplotlib figure, or as text in a terminal."""

from trainer.metrics.plots.figure import plot_runs as plot_runs
from trainer.metrics.plots.figure import plot_search as plot_search
from trainer.metrics.plots.panels import STEPS_PER_SECOND as STEPS_PER_SECOND
from trainer.metrics.plots.panels import Curve as Curve
from trainer.metrics.plots.panels import Panel as Panel
from trainer.metrics.plots.panels import figure_rows as figure_rows
from trainer.metrics.plots.panels import panels_of as panels_of
from trainer.metrics.plots.panels import with_weights as with_weights
from trainer.metrics.plots.terminal import draw_panels as draw_panels
