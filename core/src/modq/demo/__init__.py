"""`modq finetune --demo`: real weights and text out of registry packages, quantized and fine-tuned."""
