from trainer.steps import check_extensions as check_extensions, check_loss_fn as check_loss_fn
