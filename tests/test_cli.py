"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import error_line, run, succeed
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import modq
from modq.registry import KNOWN_PACKAGES

WORDS = ["the", "union", "is", "strong", "and", "we", "will", "build", "a", "fair", "future", "for", "all"]
TEXT = " ".join(WORDS[(7 * i) % len(WORDS)] for i in range(400))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with grouped queries, and a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *sorted(set(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "model"
    succeed("quantize", model, folder, "--backend", "nf4", "--set", "double_quant=true")
    return folder


@pytest.fixture(scope="module")
def adapter(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(quantized), config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


class TestListBackends:
    def test_imports_no_torch_and_no_rich(self) -> None:
        code = (
            "import sys; from modq.cli import main; main(['list-backends'], standalone_mode=False);"
            "print(sorted({'torch', 'transformers', 'peft', 'rich'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"

    def test_prints_a_table(self) -> None:
        lines = succeed("list-backends").stdout.splitlines()
        assert lines[0].split() == ["NAME", "STATUS", "BITS", "CALIBRATION", "PACKAGE", "SUMMARY"]
        assert any(line.split()[:4] == ["nf4", "ok", "4", "none"] for line in lines[1:])

    def test_json_is_one_document_and_nothing_else(self) -> None:
        document = json.loads(succeed("list-backends", "--json").stdout)
        assert (document["schema"], document["modq"], document["api"]) == (1, modq.__version__, "1.1")
        nf4 = next(backend for backend in document["backends"] if backend["name"] == "nf4")
        assert nf4["status"] == "ok"
        assert nf4["reason"] is None
        assert nf4["info"]["bits"] == [4]

    def test_strict_passes_where_every_backend_loads(self) -> None:
        assert succeed("list-backends", "--strict").stderr == ""

    def test_a_broken_backend_is_listed_with_its_reason_and_fails_strict(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        info = tmp_path / "modq_loud-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modq-loud\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[modq.quantizers]\nloud = modq_loud:INFO\n")
        (tmp_path / "modq_loud.py").write_text("print('hello')\nraise RuntimeError('no such\\nluck')\n")
        monkeypatch.syspath_prepend(tmp_path)
        result = run("list-backends", "--strict")
        assert result.exit_code == 1, result.stdout
        assert "loud: RuntimeError: no such luck" in result.stdout.splitlines()
        assert any(line.split()[:2] == ["nf4", "ok"] for line in result.stdout.splitlines())
        statuses = {
            b["name"]: b["status"] for b in json.loads(succeed("list-backends", "--json").stdout)["backends"]
        }
        assert statuses["loud"] == "broken"

    def test_none_installed_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("modq.cli.list_backends.list_backends", lambda check: [])
        assert KNOWN_PACKAGES["nf4"] in succeed("list-backends").stdout


class TestQuantize:
    def test_writes_a_model_that_reloads(self, quantized: Path) -> None:
        reloaded = AutoModelForCausalLM.from_pretrained(quantized)
        assert isinstance(reloaded.model.layers[0].self_attn.q_proj, modq.QuantLinear)
        assert (quantized / "tokenizer.json").is_file()

    def test_writes_a_format_of_another_package(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        succeed("quantize", model, out, "--backend", "nf4", "--format", "bitsandbytes")
        written = json.loads((out / "config.json").read_text())["quantization_config"]
        assert (written["quant_method"], written["load_in_4bit"]) == ("bitsandbytes", True)
        assert "does not write format 'gguf'; it writes bitsandbytes" in error_line(
            "quantize", model, tmp_path / "no", "--backend", "nf4", "--format", "gguf"
        )

    def test_prints_sizes_and_bits(self, model: Path, tmp_path: Path) -> None:
        out = succeed("quantize", model, tmp_path / "out", "--backend", "nf4").stdout
        assert "14 linears with nf4" in out
        assert "bits a weight" in out
        assert "dense" in out

    def test_leaves_nothing_behind_when_it_fails(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: object, **kwargs: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
        assert "No space left" in error_line("quantize", model, tmp_path / "out", "--backend", "nf4")
        assert list(tmp_path.iterdir()) == []

    def test_an_existing_folder_is_refused(self, model: Path, tmp_path: Path) -> None:
        assert "exists already" in error_line("quantize", model, tmp_path, "--backend", "nf4")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--backend", "nf5"], "no quantizer backend 'nf5'"),
            (["--backend", "nf4", "--bits", "3"], "expected 4"),
            (["--backend", "nf4", "--set", "colour=red"], "no option 'colour'"),
            (["--backend", "nf4", "--set", "colour"], "expected key=value"),
        ],
    )
    def test_wrong_options_are_one_line(
        self, model: Path, tmp_path: Path, arguments: list[str], said: str
    ) -> None:
        assert said in error_line("quantize", model, tmp_path / "out", *arguments)

    def test_a_missing_model_is_one_line(self, tmp_path: Path) -> None:
        said = error_line("quantize", tmp_path / "nothing", tmp_path / "out", "--backend", "nf4")
        assert "is no folder" in said

    def test_a_quantized_model_is_refused(self, quantized: Path, tmp_path: Path) -> None:
        said = error_line("quantize", quantized, tmp_path / "out", "--backend", "nf4")
        assert "quantized already" in said

    def test_an_encoder_decoder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "t5"}')
        assert "encoder-decoder" in error_line("quantize", tmp_path, tmp_path / "out", "--backend", "nf4")

    def test_a_missing_backend_is_a_usage_error(self, model: Path, tmp_path: Path) -> None:
        assert run("quantize", model, tmp_path / "out").exit_code == 2


class TestEval:
    def test_agrees_with_the_loss_of_transformers(self, model: Path, text: Path) -> None:
        document = json.loads(succeed("eval", model, "--text", text, "--window", 32, "--json").stdout)
        loaded = AutoModelForCausalLM.from_pretrained(model)
        ids = PreTrainedTokenizerFast.from_pretrained(model)(TEXT, return_tensors="pt")["input_ids"][0]
        windows = ids[: 400 // 32 * 32].view(-1, 32)
        with torch.no_grad():
            losses = torch.stack([loaded(input_ids=w[None], labels=w[None]).loss for w in windows])
        stderr = losses.std().item() / math.sqrt(12)
        assert document["windows"] == 12
        assert document["scored_tokens"] == 12 * 31
        assert document["nll"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert document["nll_stderr"] == pytest.approx(stderr, rel=1e-3)
        assert document["perplexity"] == pytest.approx(math.exp(document["nll"]))
        assert document["perplexity_stderr"] == pytest.approx(document["perplexity"] * document["nll_stderr"])

    def test_one_window_has_no_standard_error(self, model: Path, text: Path) -> None:
        arguments = ("--text", text, "--window", 32, "--max-tokens", 40, "--json")
        document = json.loads(succeed("eval", model, *arguments).stdout)
        assert (document["windows"], document["nll_stderr"]) == (1, None)

    def test_says_so_in_words(self, quantized: Path, text: Path) -> None:
        out = succeed("eval", quantized, "--text", text, "--window", 32).stdout
        assert out.startswith("perplexity ")
        assert "12 windows of 32, 372 tokens scored" in out

    def test_a_text_below_one_window_is_one_line(self, model: Path, text: Path) -> None:
        assert "expected at least one window of 512" in error_line("eval", model, "--text", text)

    def test_a_folder_without_adapter_is_one_line(self, model: Path, text: Path, tmp_path: Path) -> None:
        said = error_line("eval", model, "--text", text, "--window", 32, "--adapter", tmp_path)
        assert "adapter_config.json" in said

    def test_a_text_that_is_not_utf8_is_one_line(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        assert "not UTF-8" in error_line("eval", model, "--text", tmp_path / "latin.txt")

    def test_a_missing_text_is_a_usage_error(self, model: Path) -> None:
        assert run("eval", model, "--text", "nowhere.txt").exit_code == 2


class TestGenerate:
    def test_continues_a_prompt_the_same_way_each_time(self, quantized: Path) -> None:
        drawn = ("--prompt", "the union", "--max-new-tokens", 12, "--temperature", 1.5, "--seed", 3)
        first = succeed("generate", quantized, *drawn).stdout
        assert first.strip()
        assert succeed("generate", quantized, *drawn).stdout == first
        assert succeed("generate", quantized, *drawn[:-1], 4).stdout != first

    def test_an_adapter_changes_what_is_said(self, quantized: Path, adapter: Path) -> None:
        said = ("generate", quantized, "--prompt", "the union", "--max-new-tokens", 12)
        assert succeed(*said, "--adapter", adapter).stdout != succeed(*said).stdout

    def test_chat_needs_a_template(self, quantized: Path) -> None:
        assert "no chat template" in error_line("generate", quantized, "--prompt", "a", "--chat")


class TestInspect:
    def test_says_how_a_model_is_quantized_without_reading_its_weights(
        self, model: Path, quantized: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text((quantized / "config.json").read_text())
        found = json.loads(succeed("inspect", tmp_path, "--json").stdout)
        dense = json.loads(succeed("inspect", model, "--json").stdout)
        loaded = AutoModelForCausalLM.from_pretrained(model)
        assert found["parameters"] == dense["parameters"] == loaded.num_parameters()
        assert (found["quant_method"], dense["quant_method"]) == ("modq", None)
        held = AutoModelForCausalLM.from_pretrained(quantized)
        assert found["sizes"]["held"] == sum(p.numel() * p.element_size() for p in held.parameters())
        (scheme,) = found["schemes"]
        assert (scheme["backend"], scheme["layers"]) == ("nf4", 14)
        assert scheme["options"] == {"quant_type": "nf4", "block_size": 64, "double_quant": True}
        assert 4.1 < scheme["bits_per_weight"] < 4.2

    def test_says_so_in_words(self, quantized: Path) -> None:
        shown = succeed("inspect", quantized).stdout
        assert "14 linears by nf4 (modq-nf4" in shown
        assert "block_size=64" in shown

    def test_says_what_weights_were_quantized(self, model: Path, quantized: Path) -> None:
        config = json.loads((quantized / "config.json").read_text())
        source = config["quantization_config"]["resolved"]["source"]
        assert json.loads(succeed("inspect", quantized, "--json").stdout)["source"] == source
        assert source in succeed("inspect", quantized).stdout
        assert json.loads(succeed("inspect", model, "--json").stdout)["source"] is None


class TestInspectAdapter:
    def test_says_what_it_is_and_which_base_it_was_trained_on(self, quantized: Path, adapter: Path) -> None:
        found = json.loads(succeed("inspect", adapter, "--json").stdout)
        assert (found["adapter"], found["base_model"]) == (str(adapter), str(quantized))
        assert (found["method"], found["rank"], found["alpha"]) == ("LORA", 4, 12)
        assert found["targets"] == ["q_proj", "v_proj"]
        assert found["parameters"] == 2 * (4 * (64 + 64) + 4 * (64 + 32))
        base = json.loads((adapter / "modq.json").read_text())["base"]
        assert found["base"]["source"] == base["source"] is not None
        (scheme,) = found["base"]["schemes"]
        assert (scheme["backend"], scheme["package"], scheme["layers"]) == ("nf4", "modq-nf4", 14)
        assert scheme["options"] == {"quant_type": "nf4", "block_size": 64, "double_quant": True}
        assert scheme["version"] == modq.__version__
        assert scheme["codes"] == base["schemes"][0]["codes"] is not None

    def test_says_so_in_words(self, quantized: Path, adapter: Path) -> None:
        shown = succeed("inspect", adapter).stdout
        for expected in (
            "LORA, rank 4, alpha 12",
            "q_proj, v_proj",
            "1,792",
            str(quantized),
            "14 linears by",
        ):
            assert expected in shown

    def test_needs_neither_weights_nor_provenance(self, adapter: Path, tmp_path: Path) -> None:
        shutil.copy(adapter / "adapter_config.json", tmp_path)
        found = json.loads(succeed("inspect", tmp_path, "--json").stdout)
        assert (found["parameters"], found["base"]) == (None, None)
        shown = succeed("inspect", tmp_path).stdout
        assert "unknown: no adapter_model.safetensors" in shown
        assert "there is no modq.json" in shown


def complete(*words: str) -> list[str]:
    """What bash is offered for the last of the words after `modq`."""
    code = (
        "import sys\n"
        "from modq.cli import main\n"
        "try:\n    main(prog_name='modq')\n"
        "finally:\n    assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    )
    asked = {"_MODQ_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(["modq", *words])}
    environment = {**os.environ, **asked, "COMP_CWORD": str(len(words))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


class TestCompletion:
    def test_commands_options_and_backends_complete_without_torch(self) -> None:
        assert complete("li") == ["list-backends"]
        assert "--json" in complete("quantize", "--js")
        assert complete("finetune", "model", "--backend", "nf") == ["nf4"]
        assert complete("quantize", "model", "out", "--backend", "zz") == [""]  # an empty line

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_prints_the_script_of_a_shell(self, shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
        script = succeed("completion", shell).stdout
        assert f"_MODQ_COMPLETE={shell}_complete" in script
        monkeypatch.setenv("SHELL", f"/usr/local/bin/{shell}")
        assert succeed("completion").stdout == script

    @pytest.mark.skipif(shutil.which("bash") is None, reason="it runs the script in bash")
    def test_bash_takes_the_script(self) -> None:
        registered = f"{succeed('completion', 'bash').stdout}\ncomplete -p modq"
        done = subprocess.run(
            ["bash", "--norc", "-c", registered], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip().endswith("-F _modq_completion modq")

    def test_help_says_how_to_install_it(self) -> None:
        assert """eval "$(modq completion bash)"' >> ~/.bashrc""" in succeed("completion", "--help").stdout

    def test_a_shell_that_has_none_is_a_usage_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SHELL", "/bin/tcsh")
        assert run("completion").exit_code == 2


def test_version_is_printed() -> None:
    assert succeed("--version").stdout == f"modq {modq.__version__}\n"


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from modq.cli import main; main(['--help'], standalone_mode=False);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    for command in ("list-backends", "quantize", "finetune", "eval"):
        assert f"  {command} " in done.stdout
