"""Many processes: start, agreement before the first step, common stop, signals."""

from trainer.distributed.signals import Interruption as Interruption
from trainer.distributed.start import barrier as barrier
from trainer.distributed.start import check_agreement as check_agreement
from trainer.distributed.start import gathered as gathered
from trainer.distributed.start import initialize as initialize
from trainer.distributed.stop import CommonStop as CommonStop
