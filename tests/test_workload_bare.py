"""Bare models: the inputs and the loss are inferred, proved on fake tensors, and really run."""

import io
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autobatch.errors import InputsNotInferred, InvalidInput
from autobatch.workload import TrainingStep, Workload, resolve, ship
from autobatch.workload.runner import StepRunner


def trained(model: nn.Module, **workload: object) -> TrainingStep:
    """Resolve, check that nothing changed, then run what was resolved after the journey to another process."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    step = resolve(Workload(model, **workload))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == attributes
    stream = io.BytesIO()
    ship.dump(step, stream)
    stream.seek(0)
    StepRunner(ship.load(stream)).run([2, 2])
    return step


class LSTMClassifier(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=batch_first)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        states = self.lstm(x)[0]
        return self.head(states[:, -1] if self.lstm.batch_first else states[-1])


class DigitsCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 13 * 13, 10)

    def forward(self, x):
        return self.fc(nn.functional.max_pool2d(self.conv(x), 2).view(-1, 4 * 13 * 13))


class TextClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, text, offsets):
        return self.fc(self.bag(text, offsets))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 4, 3)
        self.facts = nn.Linear(7, 4)
        self.head = nn.Linear(8, 2)

    def forward(self, image, facts):
        return self.head(torch.cat([self.image(image).mean((2, 3)), self.facts(facts)], 1))


class LanguageModel(nn.Module):
    """As many write it: logits and, with targets, a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(65, 16)
        self.wpe = nn.Embedding(24, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 65, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids, targets=None):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        logits = self.head(self.block(x))
        loss = None if targets is None else nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


def cnn(head: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), head)


SMALL_MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), (2, 8), "mean squared error"),
    "linear classifier": (lambda: nn.Linear(8, 3), (2, 8), "cross entropy"),
    "half precision": (lambda: nn.Linear(8, 3).bfloat16(), (2, 8), "cross entropy"),
    "lstm": (LSTMClassifier, (2, 128, 8), "cross entropy"),
    "sequence first lstm": (lambda: LSTMClassifier(batch_first=False), (128, 2, 8), "cross entropy"),
    "bare gru": (lambda: nn.GRU(5, 6), (128, 2, 5), "mean squared error"),
    "1-d cnn": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 5), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)),
        (2, 2, 1024),
        "cross entropy",
    ),
    "3-d cnn": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 3, stride=4), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, 3)),
        (2, 1, 16, 112, 112),
        "cross entropy",
    ),
    "28x28 cnn": (DigitsCNN, (2, 1, 28, 28), "cross entropy"),
    "segmentation": (lambda: cnn(nn.Conv2d(4, 5, 1)), (2, 3, 224, 224), "mean squared error"),
    "autoencoder": (lambda: nn.Sequential(nn.Linear(20, 4), nn.Linear(4, 20), nn.Sigmoid()), (2, 20), "cross entropy"),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
        (2, 128, 16),
        "mean squared error",
    ),
    "tokens": (LanguageModel, (2, 24), "cross entropy per token"),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)), nn.BatchNorm1d(4)),
        (2, 6),
        "cross entropy",
    ),
    "legacy weight norm": (
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 4)), nn.BatchNorm1d(4)),
        (2, 6),
        "cross entropy",
    ),
}


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_bare_model_trains_on_inferred_inputs(name):
    make, shape, loss = SMALL_MODELS[name]
    step = trained(make())
    assert tuple(step.make_batch(2).shape) == shape
    said = " ".join(step.assumptions)
    assert loss in said and "Inputs assumed: " in said and "AdamW" in said


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (TextClassifier, [(256,), (2,)]),
        (TwoTowers, [(2, 3, 224, 224), (2, 7)]),
        (lambda: nn.Bilinear(4, 4, 3), [(2, 4), (2, 4)]),
        (lambda: nn.Transformer(16, 2, 1, 1, 32), [(128, 2, 16), (128, 2, 16)]),
        (lambda: nn.MultiheadAttention(16, 2), [(128, 2, 16)] * 3),
    ],
)
def test_several_required_arguments_are_all_inferred(make, shapes):
    step = trained(make())
    assert [tuple(part.shape) for part in step.make_batch(2)] == shapes


def test_ids_stay_within_the_vocabulary_and_the_table_of_positions():
    batch = trained(LanguageModel()).make_batch(50)
    assert batch.dtype == torch.long and batch.max() < 65 and batch.shape[1] == 24


def test_batch_norm_that_refuses_one_sample_sets_the_smallest_micro_batch():
    step = resolve(Workload(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))))
    assert step.min_micro_batch == 2 and "single sample" in step.warnings[0]
    assert resolve(Workload(cnn(nn.Flatten()))).min_micro_batch == 1


def test_a_model_in_eval_mode_is_proved_as_it_would_train_and_stays_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    assert resolve(Workload(model)).min_micro_batch == 2
    assert not model.training and not model[1].training


def test_a_criterion_gets_a_target_that_it_accepts():
    step = trained(nn.Linear(6, 1), loss=nn.BCEWithLogitsLoss())
    inputs, target = step.make_batch(3)
    assert inputs.shape == (3, 6) and target.shape == (3, 1) and target.is_floating_point()
    _, classes = trained(nn.Linear(6, 4), loss=nn.CrossEntropyLoss()).make_batch(3)
    assert classes.dtype == torch.long and classes.shape == (3,)


def test_a_training_step_without_data_gets_batches_that_it_accepts():
    def training_step(model, batch):
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)

    x, y = trained(nn.Linear(6, 4), training_step=training_step).make_batch(5)
    assert x.shape == (5, 6) and y.shape == (5,)


def test_control_flow_that_depends_on_values_is_taken_and_said():
    class Gate(nn.Linear):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    assert "could not be proved" in " ".join(trained(Gate(5, 2)).assumptions)


def test_what_cannot_be_inferred_is_an_error_with_the_call_to_make():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, graph, *, edges):
            return graph.nodes * self.weight

    with pytest.raises(InputsNotInferred) as error:
        resolve(Workload(Odd()))
    assert "(graph, *, edges)" in str(error.value)
    assert 'model(graph=batch["graph"], edges=batch["edges"])' in str(error.value)

    class Picky(nn.Linear):
        def forward(self, x):
            raise RuntimeError("only on Sundays")

    with pytest.raises(InputsNotInferred, match="only on Sundays"):
        resolve(Workload(Picky(3, 3)))


def test_the_call_to_make_runs_where_its_shapes_are_those_of_the_model():
    class ByName(nn.Linear):
        def forward(self, *, left, right):
            return super().forward(left + right)

    model = ByName(16, 10)
    with pytest.raises(InputsNotInferred) as error:
        resolve(Workload(model))
    code = textwrap.dedent(str(error.value).partition("for example:\n")[2])
    calls = []
    exec(code, {"torch": torch, "model": model, "autobatch": SimpleNamespace(fit=lambda *a, **k: calls.append(k))})
    (arguments,) = calls
    assert resolve(Workload(model, **arguments)).make_batch(3)["right"].shape == (3, 16)


def test_nothing_of_the_models_state_sees_a_proof():
    class Collects(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.outputs = []
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            self.outputs.append(super().forward(x))
            self.latest = self.outputs[-1]
            return self.latest

    model = Collects()
    resolve(Workload(model))
    assert model.calls == 0 and model.outputs == [] and not hasattr(model, "latest")


def test_a_compiled_model_is_kept_and_a_data_parallel_one_unwrapped():
    compiled = torch.compile(nn.Linear(3, 2))
    step = resolve(Workload(compiled))
    assert step.model is compiled and "compiled" in step.warnings[0]
    wrapped = nn.DataParallel(nn.Linear(3, 2))
    assert resolve(Workload(wrapped)).model is wrapped.module


def test_mistakes_in_a_workload_are_told_at_once():
    model = nn.Linear(2, 2)
    cases = [
        ({"model": nn.Linear}, "Pass an instance: Linear"),
        ({"model": nn.ReLU()}, "no trainable parameters"),
        ({"model": model, "loss": nn.MSELoss}, "Pass an instance: MSELoss"),
        ({"model": model, "loss": nn.MSELoss(), "training_step": len}, "both given"),
        ({"model": model, "precision": "fp8"}, "'fp32', 'bf16', 'fp16'"),
        ({"model": model, "optimizer": "adam"}, "callable"),
        ({"model": model, "optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, "belongs to"),
    ]
    for arguments, words in cases:
        with pytest.raises(InvalidInput, match=words):
            Workload(**arguments)


def test_what_a_hook_collects_in_a_proof_is_taken_out_again():
    model, kept = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), ["before"]
    by_layer, in_object = {}, Collector()
    model[0].register_forward_hook(lambda module, args, output: kept.append(output.detach()))
    model[1].register_forward_hook(lambda module, args, output: by_layer.update(out=output))
    model[1].register_forward_hook(in_object.hook)
    resolve(Workload(model))
    assert (kept, by_layer, in_object.outputs) == (["before"], {}, [])


class Collector:
    def __init__(self):
        self.outputs = []

    def hook(self, module, args, output):
        self.outputs.append(output)
