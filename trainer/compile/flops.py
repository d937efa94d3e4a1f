from trainer.compile.fusion import flops as flops
