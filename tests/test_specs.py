"""SPECs: how models and workloads are named on the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest
import torch
from torch import nn

from autobatch import InputsNotInferred, InvalidInput, NothingFits, Workload
from autobatch.workload import resolve, specs, zoo

MODELS = """
from torch import nn
from helpers import width
from autobatch import Workload

class Net(nn.Linear):
    pass

def make():
    return Net(width, 1)

def make_workload():
    return Workload(make())

def broken():
    raise KeyError("no such layer")

def sized(width):
    return Net(width, 1)

def number():
    return 3

ready = Net(2, 2)
answer = 42
"""


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a spec adds to the import path is gone after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def models_file(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "helpers.py").write_text("width = 7\n")
    (tmp_path / "my_models.py").write_text(MODELS)
    yield tmp_path / "my_models.py"
    for name in [name for name in sys.modules if name.endswith("my_models") or name == "helpers"]:
        module = sys.modules.pop(name)
        if name in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.unregister_pickle_by_value(module)


def test_a_file_and_a_factory_give_a_model_and_the_file_can_import_its_neighbours(models_file: Path) -> None:
    assert specs.load(f"{models_file}:make").in_features == 7


def test_a_factory_may_return_a_workload(models_file: Path) -> None:
    assert isinstance(specs.load(f"{models_file}:make_workload"), Workload)


def test_a_class_and_a_ready_model_serve_as_factories_too(models_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(specs.load(f"{models_file}:ready"), nn.Linear)
    (models_file.parent / "plain.py").write_text("from torch import nn\nclass Net(nn.Sequential): pass\n")
    assert isinstance(specs.load(f"{models_file.parent}/plain.py:Net"), nn.Sequential)


def test_a_module_is_found_in_the_current_folder(models_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models_file.parent)
    assert isinstance(specs.load("my_models:make"), nn.Linear)


def test_a_file_named_like_a_module_in_use_does_not_replace_it(tmp_path: Path) -> None:
    import json

    (tmp_path / "json.py").write_text("from torch import nn\ndef make(): return nn.Linear(1, 1)\n")
    assert isinstance(specs.load(f"{tmp_path}/json.py:make"), nn.Linear)
    assert sys.modules["json"] is json


def test_a_model_from_a_file_reaches_a_process_that_cannot_import_it(models_file: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "model.pickle"
    pickled.write_bytes(cloudpickle.dumps(specs.load(f"{models_file}:make")))
    code = f"import pickle; print(type(pickle.load(open({str(pickled)!r}, 'rb'))).__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout.strip() == "Net"


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        (":absent", r"has no 'absent'.*make, make_workload"),
        (":answer", r"answer .* is a int, not a function"),
        (":number", r"number\(\) .* returned int"),
        (":sized", r"sized .* needs width"),
        ("", r"my_models.py:factory.* has: Net, make, make_workload, broken"),
        (":", r"my_models.py:factory"),
    ],
)
def test_a_factory_that_cannot_be_used_is_explained(models_file: Path, factory: str, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        specs.load(f"{models_file}{factory}")


@pytest.mark.parametrize("spec", ["", "gpt2", "no/such/file.py:make", "no_such_module_at_all:make", "a b:c", "hf"])
def test_a_spec_that_names_nothing_shows_the_forms_there_are(spec: str) -> None:
    with pytest.raises(InvalidInput, match=r"package\.module:factory"):
        specs.load(spec)


def test_what_a_factory_raises_comes_through_as_it_is(models_file: Path) -> None:
    with pytest.raises(KeyError, match="no such layer"):
        specs.load(f"{models_file}:broken")


def test_a_file_that_does_not_import_raises_its_own_error_and_can_be_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "half_written_models.py"
    file.write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        specs.load(f"{file}:make")
    file.write_text("from torch import nn\ndef make(): return nn.Identity()\n")
    assert isinstance(specs.load(f"{file}:make"), nn.Identity)


@pytest.mark.parametrize(
    ("spec", "head"),
    [
        ("hf:gpt2?n_layer=1&n_embd=32&n_head=2&vocab_size=100", "GPT2LMHeadModel"),
        ("hf:bert?num_hidden_layers=1&hidden_size=32&num_attention_heads=2&vocab_size=100", "BertForMaskedLM"),
        ("hf:t5?num_layers=1&num_decoder_layers=1&d_model=32&vocab_size=100", "T5ForConditionalGeneration"),
        ("hf:vit?num_hidden_layers=1&hidden_size=32&num_attention_heads=2", "ViTForImageClassification"),
        ("timm:resnet10t", "ResNet"),
        ("torchvision:squeezenet1_1?num_classes=3", "SqueezeNet"),
    ],
)
def test_a_model_of_a_library_comes_ready_to_train(spec: str, head: str) -> None:
    assert type(specs.load(spec)).__name__ == head


def test_options_change_the_configuration() -> None:
    model = specs.load("hf:gpt2?n_layer=2&n_embd=32&n_head=2&vocab_size=100&activation_function=relu&attn_pdrop=0.5")
    assert (model.config.n_layer, model.config.activation_function, model.config.attn_pdrop) == (2, "relu", 0.5)
    assert len(model.transformer.h) == 2


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("hf:gpt22", "Did you mean gpt2"),
        ("hf:bert-base-uncased", "not a checkpoint"),
        ("hf:gpt2?n_layers=2", "no option 'n_layers'. Did you mean n_layer"),
        ("timm:resnet5", "Did you mean resnet5"),
        ("torchvision:resnet5", "Did you mean resnet5"),
    ],
)
def test_an_unknown_name_gets_the_close_ones(spec: str, complaint: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        specs.load(spec)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("hf:gpt2?n_layer=2&n_embd=100", r"hf:gpt2 cannot be built with n_layer=2, n_embd=100: .*divisible.*[^.]\.$"),
        ("timm:resnet10t?no_such_option=1", r"timm:resnet10t cannot be built with no_such_option=1: "),
        ("torchvision:resnet18?no_such_option=1", r"torchvision:resnet18 cannot be built with no_such_option=1: "),
    ],
)
@pytest.mark.parametrize("limit_bytes", [None, 2**40])
def test_options_that_a_library_refuses_are_told_with_its_reason(
    spec: str, complaint: str, limit_bytes: int | None
) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        specs.load(spec, limit_bytes)


def test_a_lightning_module_that_optimizes_manually_is_told_to_pass_a_training_step() -> None:
    lightning = pytest.importorskip("lightning")

    class Manual(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: torch.Tensor) -> None:
            self.manual_backward(self(batch).mean())

    with pytest.raises(InputsNotInferred, match=r"manual optimization.*training_step=callable"):
        resolve(Workload(Manual()))


def test_a_model_whose_weights_alone_are_too_large_is_refused_before_it_is_built() -> None:
    with pytest.raises(NothingFits, match=r"hf:llama alone take 25\.\d+ GiB, but there is 4\.00 GiB") as caught:
        specs.load("hf:llama", limit_bytes=4 * 1024**3)
    assert caught.value.needed_bytes > 4 * 1024**3


def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InvalidInput) as caught:
        specs.load("timm:resnet50")
    assert 'pip install "torch-autobatch[vision]"' in str(caught.value)


def test_a_library_that_does_not_load_is_told_with_its_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidInput, match=f"torchvision::nms.*torch {torch.__version__.split('+')[0]}"):
        zoo.load_from_zoo("timm", "resnet50")
