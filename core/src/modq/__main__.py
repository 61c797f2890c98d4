"""`python -m modq`, for launchers that take a module: `torchrun --nproc-per-node 2 -m modq finetune …`."""

from modq.cli import main

main(prog_name="modq")
