"""Hugging Face models under accumulation: what their own losses are means over is found out."""

import pytest
import torch
from plans import plan_of
from stepping import Kept, distance

transformers = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def padded_texts(n, length):
    """Texts of unequal lengths, whose padding counts in no loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 99, (n, length), generator=generator)
    lengths = torch.randint(3, length + 1, (n, 1), generator=generator)
    mask = torch.arange(length) < lengths
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def models():
    yield "foretells the next token", transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    config = transformers.BertConfig(**SMALL, **NO_DROPOUT)
    yield "fills in tokens", transformers.BertForMaskedLM(config)
    config = transformers.T5Config(
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        vocab_size=99,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    yield "translates", transformers.T5ForConditionalGeneration(config)


@pytest.mark.filterwarnings("error::UserWarning:autobatch")
def test_accumulated_token_means_are_those_of_the_whole_batch():
    torch.manual_seed(0)
    for kind, model in models():
        model.train()
        batch = padded_texts(14, 12)
        whole = model(**batch)
        whole.loss.backward()
        expected = [p.grad.clone() for p in model.parameters()]
        optimizer = Kept(model.parameters(), lr=0.1)
        result = plan_of(14, 4).stepper(model, optimizer).step(batch)
        assert distance(optimizer.seen, expected) < 1e-6, kind
        assert float(result) == pytest.approx(whole.loss.item(), rel=1e-6), kind


def test_classes_of_whole_texts_are_means_over_samples():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, **NO_DROPOUT, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    batch = padded_texts(14, 12) | {"labels": torch.randint(3, (14,))}
    model(**batch).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    optimizer = Kept(model.parameters(), lr=0.1)
    plan_of(14, 4).stepper(model, optimizer).step(batch)
    assert distance(optimizer.seen, expected) < 1e-6
