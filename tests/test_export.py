"""A plan in the words of other frameworks."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
from plans import plan_of

from autobatch.errors import InvalidInput
from autobatch.export.configs import Framework
from autobatch.trial import Trial, Verdict

HERE = Path(__file__).parent
FRAMEWORKS = get_args(Framework)


@contextmanager
def nothing_to_say() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def quietly(plan: Any, framework: str, **options: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plan.to(framework, **options)


def test_transformers_takes_the_size_per_device_the_steps_and_the_precision() -> None:
    plan = plan_of(256, 32, ranks=2, precision="bf16")
    with nothing_to_say():
        assert plan.to("transformers") == {
            "per_device_train_batch_size": 32,
            "gradient_accumulation_steps": 4,
            "bf16": True,
            "fp16": False,
        }


@pytest.mark.parametrize(("precision", "said"), [("fp32", "32-true"), ("bf16", "bf16-mixed"), ("fp16", "16-mixed")])
def test_lightning_takes_keywords_for_its_trainer_and_for_the_loader(precision: Any, said: str) -> None:
    config = quietly(plan_of(256, 32, precision=precision), "lightning")
    assert config == {
        "dataloader": {"batch_size": 32},
        "trainer": {"accumulate_grad_batches": 8, "precision": said},
    }


@pytest.mark.parametrize(("precision", "said"), [("fp32", "no"), ("bf16", "bf16"), ("fp16", "fp16")])
def test_accelerate_takes_keywords_for_its_accelerator_and_for_the_loader(precision: Any, said: str) -> None:
    config = quietly(plan_of(256, 32, precision=precision), "accelerate")
    assert config == {
        "dataloader": {"batch_size": 32},
        "accelerator": {"gradient_accumulation_steps": 8, "mixed_precision": said},
    }


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_is_given_sizes_that_multiply_to_its_train_batch_size(ranks: int, precision: Any) -> None:
    config = quietly(plan_of(256, 32, ranks=ranks, precision=precision), "deepspeed")
    size, steps = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    assert size * steps * ranks == config["train_batch_size"] == 256
    assert config["bf16"] == {"enabled": precision == "bf16"}
    assert config["fp16"] == {"enabled": precision == "fp16"}


@pytest.mark.parametrize(("precision", "said"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_torchtitan_counts_samples_on_one_rank_and_on_all(precision: Any, said: str) -> None:
    plan = plan_of(256, 32, ranks=2, precision=precision)
    with nothing_to_say():
        training = plan.to("torchtitan")["training"]
    assert training == {"local_batch_size": 32, "global_batch_size": 256, "mixed_precision_param": said}


def test_newer_torchtitan_counts_tokens() -> None:
    training = plan_of(256, 32, ranks=2).to("torchtitan", tokens_per_sample=2048)["training"]
    assert training["num_tokens_per_microbatch_per_dp_rank"] == 32 * 2048
    assert training["num_tokens_per_train_step"] == 256 * 2048
    assert training["max_context_length"] == 2048
    assert "local_batch_size" not in training


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_config_is_json(framework: str) -> None:
    config = quietly(plan_of(256, 37), framework)
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_target_that_is_one_micro_batch_leaves_nothing_to_say(framework: str) -> None:
    with nothing_to_say():
        plan_of(32, 32, batch_dims={"input_ids": 0}).to(framework)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_other_sizes_than_the_plans_are_said(framework: str) -> None:
    with pytest.warns(UserWarning, match=rf"{framework} takes one .*: 8 × 32 samples instead of .* 7 .* at most 37\."):
        plan_of(256, 37).to(framework)


def test_a_size_that_was_not_tried_is_said_with_how_to_try_it() -> None:
    trial = Trial(micro_batch_sizes=(37, 36), verdict=Verdict.FITS, peak_bytes=1)
    plan = plan_of(256, 37, trials=(trial,)).model_copy(update={"verified": True})
    with pytest.warns(UserWarning, match=r"32 itself was not tried: fit\(\.\.\., max_micro_batch=32\)"):
        plan.to("deepspeed")


def test_a_warning_points_at_the_line_that_asked() -> None:
    with pytest.warns(UserWarning, match="one micro-batch size") as caught:
        plan_of(256, 37).to("deepspeed")
    assert caught[0].filename == __file__


@pytest.mark.parametrize("framework", ["lightning", "accelerate"])
def test_a_last_optimizer_step_that_is_divided_by_too_much_is_said(framework: str) -> None:
    with pytest.warns(UserWarning, match="a multiple of 128 samples"):
        plan_of(256, 32, ranks=2).to(framework)


@pytest.mark.parametrize("framework", ["transformers", "lightning", "accelerate", "deepspeed"])
def test_a_mean_over_micro_batches_of_tokens_is_said(framework: str) -> None:
    with pytest.warns(UserWarning, match="not the mean over all tokens"):
        plan_of(256, 32, batch_dims={"input_ids": 0, "labels": 0}).to(framework)


def test_deepspeeds_precision_is_told_apart_from_autocast() -> None:
    with pytest.warns(UserWarning, match=r'section "bf16" has the weights themselves in bfloat16.*"torch_autocast"'):
        plan_of(256, 32, precision="bf16").to("deepspeed")


def test_torchtitan_has_no_float16() -> None:
    with pytest.warns(UserWarning, match="no float16"):
        training = plan_of(256, 32, precision="fp16").to("torchtitan")["training"]
    assert training["mixed_precision_param"] == "bfloat16"


def test_an_unknown_framework_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="'transformers', 'lightning', 'accelerate', 'deepspeed', 'torchtitan'"):
        plan_of(256, 32).to("keras")  # type: ignore[arg-type]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_target_that_ranks_cannot_share_equally_is_an_error(framework: str) -> None:
    with pytest.raises(InvalidInput, match="not a multiple of 3 ranks"):
        plan_of(256, 32, ranks=3).to(framework)


def test_tokens_are_for_torchtitan_alone() -> None:
    with pytest.raises(InvalidInput, match="deepspeed counts samples"):
        plan_of(256, 32).to("deepspeed", tokens_per_sample=2048)
    with pytest.raises(InvalidInput, match="at least 1, but is 0"):
        plan_of(256, 32).to("torchtitan", tokens_per_sample=0)


def test_a_config_needs_neither_torch_nor_the_framework() -> None:
    code = """
import sys
from plans import plan_of
for framework in {frameworks}:
    plan_of(32, 32).to(framework)
import autobatch.export
print([name for name in ("torch", "transformers", "lightning", "accelerate") if name in sys.modules])
"""
    code = code.replace("{frameworks}", repr(FRAMEWORKS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE)
    assert done.stdout.strip() == "[]"


def test_what_export_has_is_documented() -> None:
    import autobatch.export

    for name in autobatch.export.__all__:
        assert getattr(autobatch.export, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        autobatch.export.fit  # noqa: B018
