"""Pictures of what runs recorded: as a figure of matplotlib, or as text in a terminal."""

from trainer.plots.figure import plot_runs as plot_runs
from trainer.plots.figure import plot_search as plot_search
from trainer.plots.panels import Curve as Curve
from trainer.plots.panels import Panel as Panel
from trainer.plots.panels import panels_of as panels_of
from trainer.plots.panels import with_weights as with_weights
from trainer.plots.terminal import draw_panels as draw_panels
