"""Configurations in the hands of the packages they are for, where these are installed."""

import dataclasses
import warnings

import pytest
from plans import plan_of


def config_of(framework, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the configuration cannot say
        return plan_of(256, 32, **fields).to(framework)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_takes_the_configuration(precision):
    runtime = pytest.importorskip("deepspeed.runtime.config")
    read = runtime.DeepSpeedConfig(config_of("deepspeed", precision=precision))
    sizes = (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps)
    assert sizes == (256, 32, 8)
    assert (read.bfloat16_config.enabled, read.float16_config.enabled) == (precision == "bf16", precision == "fp16")


def test_deepspeed_refuses_the_configuration_of_another_number_of_ranks():
    runtime = pytest.importorskip("deepspeed.runtime.config")
    with pytest.raises(AssertionError, match="train_batch_size is not equal"):
        runtime.DeepSpeedConfig(config_of("deepspeed", ranks=2))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_torchtitan_takes_the_configuration(precision):
    configs = pytest.importorskip("torchtitan.config.configs")
    training = config_of("torchtitan", precision=precision)["training"]
    changed = dataclasses.asdict(configs.TrainingConfig(**training))
    assert {name: changed[name] for name in training} == training
