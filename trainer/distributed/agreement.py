from trainer.distributed.start import check_agreement as check_agreement, gathered as gathered, AllOrNone as AllOrNone
