"""What `modq quantize`, `modq finetune` and `modq eval` do, on top of transformers, PEFT and TRL."""
