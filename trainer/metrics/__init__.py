"""Metrics: weighted averages, history, throughput."""

from trainer.metrics.average import WeightedAverage as WeightedAverage
from trainer.metrics.history import History as History
from trainer.metrics.throughput import Meter as Meter
from trainer.metrics.throughput import Throughput as Throughput
