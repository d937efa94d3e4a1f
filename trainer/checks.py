from trainer.errors import check_count as check_count, did_you_mean as did_you_mean
