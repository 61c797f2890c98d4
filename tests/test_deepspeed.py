"""DeepSpeed ZeRO-3 is refused before anything is loaded; stages 1 and 2 are not modq's concern."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations import deepspeed as integration

import modq
from modq.errors import OptionError


class Configured(HfDeepSpeedConfig):  # type: ignore[misc]  # transformers is untyped
    """The state that TrainingArguments(deepspeed=...) sets up, where DeepSpeed is not installed."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        integration.set_hf_deepspeed_config(self)

    def is_zero3(self) -> bool:
        return self.stage == 3


@pytest.fixture
def dense(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> AutoModelForCausalLM:
    monkeypatch.setattr(integration, "_hf_deepspeed_config_weak_ref", None)
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_stages_that_leave_parameters_whole_are_allowed(dense, tiny_llama, stage):
    configured = Configured(stage)
    assert not integration.is_deepspeed_zero3_enabled()
    modq.quantize_model(dense, "nf4")
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=modq.ModqConfig("nf4"))
    del configured  # transformers holds it weakly


def test_zero3_is_refused_in_one_line_that_says_what_to_use(dense, tiny_llama, tmp_path):
    modq.quantize_model(dense, "nf4").save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_llama)
    configured = Configured(3)
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=modq.ModqConfig("nf4")),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
        lambda: modq.quantize_model(fresh, "nf4"),
    ):
        with pytest.raises(OptionError, match=r"ZeRO-3 .*; use ZeRO stage 1 or 2, DDP, or FSDP2") as refused:
            load()
        assert "\n" not in str(refused.value)
    assert not any(isinstance(module, modq.QuantLinear) for module in fresh.modules())
    del configured
