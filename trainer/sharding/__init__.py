"""Sharding: meshes, partition rules, sharded initialization, and batches on devices."""

from trainer.sharding.mesh import BATCH_AXES as BATCH_AXES
from trainer.sharding.mesh import batch_sharding as batch_sharding
from trainer.sharding.mesh import check_batch_fits as check_batch_fits
from trainer.sharding.mesh import make_mesh as make_mesh
from trainer.sharding.partition import bytes_per_device as bytes_per_device
from trainer.sharding.partition import describe as describe
from trainer.sharding.partition import partition as partition
from trainer.sharding.partition import shardings_of as shardings_of

from trainer.sharding.create import abstract_state as abstract_state  # isort: skip
from trainer.sharding.create import create_sharded as create_sharded  # isort: skip
from trainer.sharding.step import jit_step as jit_step  # isort: skip
