"""`fit` with nothing but a model and a target, for the models that people have."""

import pytest
import torch
from torch import nn

import autobatch

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")
lightning = pytest.importorskip("lightning")


class LSTMClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 3)
        self.example_input_array = torch.zeros(2, 8)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def small(name, **changes):
    """An architecture of transformers in a few layers, for pre-training or its like."""
    head = {"t5": "Seq2SeqLM", "bert": "MaskedLM", "vit": "ImageClassification"}.get(name, "CausalLM")
    config = transformers.AutoConfig.for_model(name, **changes)
    return getattr(transformers, f"AutoModelFor{head}").from_config(config)


ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MODELS = {
    "sequential": lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)),
    "torchvision resnet": lambda: torchvision.models.resnet18(num_classes=10),
    "timm vit": lambda: timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10),
    "timm convnext": lambda: timm.create_model("convnext_atto", num_classes=10),
    "gpt2": lambda: small("gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=200),
    "bert": lambda: small("bert", vocab_size=200, **ENCODER),
    "t5": lambda: small("t5", d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=200),
    "vit": lambda: small("vit", image_size=32, patch_size=8, **ENCODER),
    "llama": lambda: small("llama", vocab_size=200, num_key_value_heads=2, **ENCODER),
    "lstm classifier": LSTMClassifier,
    "1-d cnn": lambda: nn.Sequential(
        nn.Conv1d(4, 8, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3)
    ),
    "lightning": Module,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_bare_model_is_enough(name):
    model = MODELS[name]()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    plan = autobatch.fit(model, target=256, max_micro_batch=2, device="cpu")
    assert plan.micro_batch_sizes == (2,) * 128
    assert plan.verified
    assert plan.assumptions
    after = model.state_dict().values()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
