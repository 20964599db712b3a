"""A transformers Trainer on several ranks, with the sizes that its own trials found."""

import json

import pytest
from torchrun import torchrun

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

IMPORTS = """
import copy, json
from pathlib import Path
import conftest, warm
from autobatch import child
from test_export_trainer import *
child._start = warm.start_child
"""
TRAINS = """
data = ragged_texts(STEPS * TARGET)
model = tiny_llama()
reference = copy.deepcopy(model)
expected = trained_on_full_batches(reference, data, torch.optim.SGD(reference.parameters(), lr=0.5))
trainer = trainer_of(model, Path(out.name).parent, data, num_train_epochs=1, learning_rate=0.5, optim="sgd")
plan = fit_trainer(trainer, TARGET, device="cpu", max_micro_batch=4)
trainer.train()
apart = max(float((a - b).abs().max()) for a, b in zip(model.parameters(), expected))
sizes = [trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps]
print(json.dumps([plan.verified, plan.world_size, sizes, trainer.state.global_step, apart]), file=out)
"""


def test_a_trainers_weights_equal_those_of_full_batches_over_two_ranks(tmp_path):
    said = [json.loads(text) for text in torchrun(tmp_path, 2, IMPORTS, trains=TRAINS)["trains"]]
    for verified, world_size, sizes, steps, apart in said:
        assert (verified, world_size, sizes, steps) == (True, 2, [4, 3], 3)
        assert apart < 1e-5
