"""`modq finetune`: train a LoRA adapter on a model that is quantized, or gets quantized while loading."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modq.cli.config import config_option
from modq.cli.progress import showing_progress
from modq.cli.settings import backend_options, collect_options, dtype_option

if TYPE_CHECKING:
    from modq.train.progress import Progress
    from modq.train.sft import Trained

POSITIVE = click.IntRange(min=1)


@click.command("finetune")
@click.argument("model", required=False)
@click.option("--data", help="What to train on, see above.")
@click.option("--output", type=click.Path(path_type=Path), help="The new folder of the adapter.")
@backend_options(required=False)
@dtype_option
@click.option("--r", type=POSITIVE, default=8, show_default=True, help="Rank of the adapter.")
@click.option(
    "--alpha", type=float, default=16.0, show_default=True, help="The adapter counts alpha / r times."
)
@click.option("--dropout", type=click.FloatRange(0, 1), default=0.0, show_default=True)
@click.option(
    "--target-modules", help="Names of linears, with commas between; by default every linear but the head."
)
@click.option("--lr", "learning_rate", type=float, default=2e-4, show_default=True)
@click.option("--epochs", type=float, default=1.0, show_default=True)
@click.option("--max-steps", type=POSITIVE, help="Stop there, whatever the epochs.")
@click.option(
    "--batch-size", type=POSITIVE, default=4, show_default=True, help="Examples a batch, in each process."
)
@click.option(
    "--gradient-accumulation", type=POSITIVE, default=1, show_default=True, help="Batches in a step."
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    help="Tokens an example; longer ones are cut. By default 512, or the model's context.",
)
@click.option(
    "--optim", default="adamw_torch", show_default=True, help="An optimizer by its name in transformers."
)
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=True,
    show_default=True,
    help="Compute activations twice instead of keeping them.",
)
@click.option("--eval-data", help="Scored before, during and after training; in a form of --data.")
@click.option("--eval-every", type=POSITIVE, default=100, show_default=True, help="Steps.")
@click.option(
    "--save-every", type=POSITIVE, default=100, show_default=True, help="Steps between checkpoints."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on with this very run, which was stopped or killed.")
@config_option
@click.option(
    "--demo", is_flag=True, help="Fine-tune a real small model on real text, in minutes; needs no MODEL."
)
def command(model: str | None, demo: bool, **given: Any) -> None:
    """Train a LoRA adapter on every linear of MODEL with TRL's SFTTrainer.

    MODEL is a folder or the name of a model on the hub. If it is quantized already, leave --backend out; with
    --backend it is quantized while it loads; with neither it is trained on as it is.

    --data is a JSONL file with `text`, `prompt` and `completion`, or `messages` in each line; a .txt file,
    which is trained on whole; or a dataset with such columns, as NAME[@CONFIG][:SPLIT].

    Ctrl-C stops after the step and keeps a checkpoint, in the folder OUTPUT.unfinished; the same command with
    --resume goes on from there, and from the last checkpoint of a run that was killed.

    With several GPUs: torchrun --nproc-per-node 2 -m modq finetune ...
    """
    if demo:
        _refuse_beside_demo(click.get_current_context())
        from modq.train.quiet import quiet  # imports torch, as does the next

        with quiet():
            from modq.demo.run import main

            main()
        return
    needed = {"MODEL": model, "--data": given["data"], "--output": given["output"]}
    if missing := [name for name, value in needed.items() if value is None]:
        raise click.UsageError(f"{', '.join(missing)} missing; or try --demo")
    _finetune(str(model), **given)


def _refuse_beside_demo(ctx: click.Context) -> None:
    """The demo's figures are of one recipe: refuse what would be ignored."""
    default = click.core.ParameterSource.DEFAULT
    if given := [name for name in ctx.params if name != "demo" and ctx.get_parameter_source(name) != default]:
        raise click.UsageError(f"--demo takes nothing else; leave out {', '.join(given)}")


def _finetune(
    model: str,
    data: str,
    output: Path,
    backend: str | None,
    bits: int | None,
    group_size: int | None,
    settings: tuple[str, ...],
    dtype: str,
    eval_data: str | None,
    max_steps: int | None,
    max_length: int | None,
    target_modules: str | None,
    resume: bool,
    **recipe: Any,
) -> None:
    targets = tuple(target_modules.split(",")) if target_modules else "all-linear"
    options = collect_options(backend, bits, group_size, settings)
    from modq.train.quiet import quiet  # imports torch, as do those below

    with quiet():
        from modq.train.finetune import Job, finetune
        from modq.train.memory import give_back_large_pieces
        from modq.train.processes import is_main, part
        from modq.train.sft import LoraRecipe

        job = Job(
            model=model,
            data=data,
            output=output,
            backend=backend,
            options=options,
            dtype=dtype,
            eval_data=eval_data,
            max_length=max_length,
            recipe=LoraRecipe(**recipe, target_modules=targets, max_steps=max_steps or -1),
        )
        give_back_large_pieces()
        with showing_progress("step") as show:

            def report(progress: Progress) -> None:
                show(progress.step, progress.steps, _described(progress))

            trained = finetune(job, resume=resume, report=report, stoppable=True)
        part()
    if is_main():
        _show(trained, output)


def _described(progress: Progress) -> str:
    rate, memory = f"{progress.tokens_per_second:.0f} tokens/s", f"{progress.peak_memory / 1e9:.2f} GB"
    return f"loss {progress.loss:.4f}  {rate}  {memory}"


def _show(trained: Trained, output: Path) -> None:
    length = f"{trained.steps} steps, {trained.tokens:,} tokens, {trained.seconds:.1f} s"
    memory = f"peak memory {trained.peak_memory / 1e9:.2f} GB"
    click.echo(f"wrote      {output}")
    click.echo(f"trained    {trained.trainable_parameters:,} parameters, {length}")
    click.echo(f"speed      {trained.tokens_per_second:.0f} tokens/s, {memory}")
    click.echo(f"loss       {trained.train_loss:.4f} over training")
    if trained.eval_loss is not None:
        click.echo(f"eval loss  {trained.eval_loss_before:.4f} before, {trained.eval_loss:.4f} after")
