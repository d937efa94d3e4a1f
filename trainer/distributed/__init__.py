"""Multiple processes: startup, agreement before the first step, stopping together, signals."""

from trainer.distributed.agreement import AllOrNone as AllOrNone
from trainer.distributed.agreement import check_agreement as check_agreement
from trainer.distributed.replicas import check_replicas as check_replicas
from trainer.distributed.agreement import gathered as gathered
from trainer.distributed.agreement import barrier as barrier
from trainer.distributed.passes import CommonPass as CommonPass
from trainer.distributed.signals import Signals as Signals
from trainer.distributed.start import initialize as initialize
from trainer.distributed.stop import CommonStop as CommonStop
