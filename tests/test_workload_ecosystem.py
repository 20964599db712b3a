"""Models of torchvision, timm, transformers and Lightning, bare and small: resolved, and really run."""

import lightning
import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from autobatch.workload import TrainingStep, Workload, resolve
from autobatch.workload.runner import StepRunner

TEXT = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SHORT = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = {**TEXT, "image_size": 32, "patch_size": 8}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 120, "n_positions": 24,
      "decoder_start_token_id": 0}  # fmt: skip
GPT2 = {"n_positions": 64}
WHISPER = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 120, "max_source_positions": 50,
    "max_target_positions": 20, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
WAV2VEC2 = {**TEXT, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (160, 2), "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}  # fmt: skip

HUGGING_FACE = {
    "GPT2LMHeadModel": ("gpt2", {**SHORT, "vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, **GPT2}),
    "BertForMaskedLM": ("bert", {**TEXT, "max_position_embeddings": 48}),
    "BertForSequenceClassification": ("bert", {**TEXT, "max_position_embeddings": 48, "num_labels": 3}),
    "BertForTokenClassification": ("bert", {**TEXT, "max_position_embeddings": 48, "num_labels": 3}),
    "BertForQuestionAnswering": ("bert", {**TEXT, "max_position_embeddings": 48}),
    "BertForMultipleChoice": ("bert", {**TEXT, "max_position_embeddings": 48}),
    "BertForPreTraining": ("bert", {**TEXT, "max_position_embeddings": 48}),
    "BertModel": ("bert", {**TEXT, "max_position_embeddings": 48}),
    "RobertaForMaskedLM": ("roberta", {**TEXT, "max_position_embeddings": 50, "pad_token_id": 1}),
    "LlamaForCausalLM": ("llama", {**TEXT, **SHORT, "max_position_embeddings": 64}),
    "MixtralForCausalLM": (
        "mixtral",
        {**TEXT, **SHORT, "max_position_embeddings": 64, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
    "T5ForConditionalGeneration": ("t5", {**SHORT, **T5}),
    "T5Model": ("t5", {**SHORT, **T5}),
    "BartForSequenceClassification": (
        "bart",
        {**SHORT, "vocab_size": 120, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 40},
    ),
    "ViTForImageClassification": ("vit", {**VISION, "num_labels": 5}),
    "SegformerForSemanticSegmentation": (
        "segformer",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "decoder_hidden_size": 16, "num_labels": 4, "image_size":
        64},
    ),
    "WhisperForConditionalGeneration": ("whisper", {**SHORT, **WHISPER}),
    "Wav2Vec2ForSequenceClassification": ("wav2vec2", {**WAV2VEC2, "num_labels": 3, "classifier_proj_size": 8}),
    "Wav2Vec2ForCTC": ("wav2vec2", {**WAV2VEC2}),
    "CLIPModel": (
        "clip",
        {"text_config": {**TEXT, **SHORT, "max_position_embeddings": 20}, "vision_config": VISION, "projection_dim":
        16},
    ),
}  # fmt: skip


def run(step: TrainingStep) -> TrainingStep:
    assert StepRunner(step).run([2]) == pytest.approx(0, abs=1e6)  # a number, not nan
    return step


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_train_on_inputs_from_their_config(name):
    kind, settings = HUGGING_FACE[name]
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **settings))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step = resolve(Workload(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    run(step)
    said = " ".join(step.assumptions)
    assert "configuration" in said
    assert ("the one that the model returns" in said) != (name in ("BertModel", "T5Model"))


def test_sequences_are_as_long_as_the_config_allows():
    kind, settings = HUGGING_FACE["GPT2LMHeadModel"]
    model = transformers.GPT2LMHeadModel(transformers.AutoConfig.for_model(kind, **settings))
    batch = resolve(Workload(model)).make_batch(3)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, 64)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_timm_models_train_on_their_pretrained_size(name):
    step = run(resolve(Workload(timm.create_model(name, num_classes=10, **({"depth": 2} if "vit" in name else {})))))
    assert step.make_batch(2).shape == (2, 3, 224, 224) and "pretrained_cfg" in step.assumptions[0]


def test_timm_models_made_for_another_size_get_that_size():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=1, img_size=64)
    assert run(resolve(Workload(model))).make_batch(2).shape == (2, 3, 64, 64)


def test_a_torchvision_resnet_trains_on_images():
    step = run(resolve(Workload(torchvision.models.resnet18())))
    assert step.make_batch(2).shape == (2, 3, 224, 224) and "conv1 (Conv2d with 3 channels)" in step.assumptions[0]


class Lit(lightning.LightningModule):
    def __init__(self, example: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        self.losses = []
        if example:
            self.example_input_array = torch.zeros(7, 3, 4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.losses.append(loss)
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize(("example", "shape"), [(True, (5, 3, 4)), (False, (5, 12))])
def test_a_lightning_module_trains_with_its_own_step_and_optimizer(example, shape):
    module = Lit(example)
    step = resolve(Workload(module))
    assert module.losses == []
    inputs, target = step.make_batch(5)
    assert inputs.shape == shape and target.shape == (5,) and target.dtype == torch.long
    assert isinstance(StepRunner(step).optimizer, torch.optim.SGD)
    assert any("SGD" in sentence for sentence in step.assumptions)
    run(step)


def test_a_lightning_module_without_forward_trains():
    class NoForward(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(6, 5)

        def training_step(self, batch):
            x, y = batch
            return nn.functional.cross_entropy(self.encoder(x), y)

        def configure_optimizers(self):
            raise RuntimeError("needs a trainer")

    step = run(resolve(Workload(NoForward())))
    assert any("AdamW" in sentence and "needs a trainer" in sentence for sentence in step.assumptions)


def test_a_lightning_module_around_a_hugging_face_model_trains():
    class Wrapper(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            kind, settings = HUGGING_FACE["BertForSequenceClassification"]
            self.model = transformers.BertForSequenceClassification(transformers.AutoConfig.for_model(kind, **settings))

        def training_step(self, batch, batch_idx):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    assert set(run(resolve(Workload(Wrapper()))).make_batch(2)) == {"input_ids", "attention_mask", "labels"}
