"""`modq finetune`: train a LoRA adapter on a model that is quantized, or gets quantized while loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from modq.cli.settings import backend_options, collect_options, dtype_option

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("finetune")
@click.argument("model", required=False)
@click.option(
    "--data", type=FILE, help="JSONL with `text`, `prompt` + `completion` or `messages`; or a .txt."
)
@click.option("--output", type=click.Path(path_type=Path), help="The new folder of the adapter.")
@backend_options(required=False)
@dtype_option
@click.option("--r", type=click.IntRange(min=1), default=8, show_default=True, help="Rank of the adapter.")
@click.option(
    "--alpha", type=float, default=16.0, show_default=True, help="The adapter counts alpha / r times."
)
@click.option("--dropout", type=click.FloatRange(0, 1), default=0.0, show_default=True)
@click.option(
    "--target-modules", help="Names of linears, with commas between; by default every linear but the head."
)
@click.option("--lr", "learning_rate", type=float, default=2e-4, show_default=True)
@click.option("--epochs", type=float, default=1.0, show_default=True)
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop there, whatever the epochs.")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@click.option(
    "--gradient-accumulation",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Batches in a step.",
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
@click.option(
    "--max-length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens an example."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--eval-data", type=FILE, help="Scored before and after; in a form of --data.")
@click.option(
    "--demo", is_flag=True, help="Fine-tune a real small model on real text, in minutes; needs no MODEL."
)
def command(model: str | None, demo: bool, **given: Any) -> None:
    """Train a LoRA adapter on every linear of MODEL with TRL's SFTTrainer.

    MODEL is a folder or the name of a model on the hub. If it is quantized already, leave --backend out; with
    --backend it is quantized while it loads; with neither it is trained on as it is.
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
    by_user = click.core.ParameterSource.COMMANDLINE
    if given := [name for name in ctx.params if name != "demo" and ctx.get_parameter_source(name) is by_user]:
        raise click.UsageError(f"--demo takes nothing else; leave out {', '.join(given)}")


def _finetune(
    model: str,
    data: Path,
    output: Path,
    backend: str | None,
    bits: int | None,
    group_size: int | None,
    settings: tuple[str, ...],
    dtype: str,
    eval_data: Path | None,
    max_steps: int | None,
    target_modules: str | None,
    **recipe: Any,
) -> None:
    targets = tuple(target_modules.split(",")) if target_modules else "all-linear"
    options = collect_options(backend, bits, group_size, settings)
    from modq.train.quiet import quiet  # imports torch, as does the next

    with quiet():
        from modq.train.finetune import Job, finetune
        from modq.train.sft import LoraRecipe

        job = Job(
            model=model,
            data=data,
            output=output,
            backend=backend,
            options=options,
            dtype=dtype,
            eval_data=eval_data,
            recipe=LoraRecipe(**recipe, target_modules=targets, max_steps=max_steps or -1),
        )
        trained = finetune(job, _show_progress)
    click.echo(f"wrote      {output}")
    size = f"{trained.trainable_parameters:,} parameters"
    click.echo(f"trained    {size}, {trained.steps} steps, {trained.seconds:.1f} s")
    click.echo(f"loss       {trained.train_loss:.4f} over training")
    if trained.eval_loss is not None:
        click.echo(f"eval loss  {trained.eval_loss_before:.4f} before, {trained.eval_loss:.4f} after")


def _show_progress(step: int, steps: int, loss: float) -> None:
    click.echo(f"step {step}/{steps}  loss {loss:.4f}", err=True)
