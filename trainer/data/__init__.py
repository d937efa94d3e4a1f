"""Data: in-memory arrays, loaders, and positions to resume them from."""

from trainer.data.memory import InMemoryData as InMemoryData
from trainer.data.loaders import open_loader as open_loader
from trainer.data.resumable import LoaderPass as LoaderPass
from trainer.data.resumable import LoaderPosition as LoaderPosition
from trainer.data.prefetching import Prefetched as Prefetched
