"""A probe in any Trainer on several ranks, whose weights are whole on each rank or in parts."""

import os

import pytest
import torch
import torch.distributed as dist
from models import build, samples
from ranked import on_ranks
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import geffect_fast as gf
from geffect_fast import ranks
from geffect_fast.capture.shards import shard
from geffect_fast.training.single_process import single_process

SETS = {"forget": samples([9, 17, 5, 12, 8], 1, 3), "retain": samples([9, 14, 6], 2, 3)}
TRAINING = {"max_steps": 2, "learning_rate": 0.05, "optim": "sgd", "use_cpu": True}
TRAINING |= {"per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}


class Rows(Dataset):
    """Rows of one length, the same on all ranks."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = {key: torch.tensor(value) for key, value in samples([8], index)[0].items()}
        return row | {"attention_mask": torch.ones(8, dtype=torch.long)}


def trained(folder, kind):
    """The probes of a training, and a separate profile of the final model."""
    model, reference = build("llama"), folder / "before"
    callback = gf.integrations.GEffectCallback(
        SETS,
        every=1,
        objectives=["ga", "npo(beta=0.5)"],
        reference_model=str(reference),
        out=folder / kind,
    )
    arguments = {"output_dir": str(folder / "trainer"), "disable_tqdm": True, **TRAINING}
    cpu = torch.device("cpu")
    if kind == "ddp":
        rank, size = dist.get_rank(), dist.get_world_size()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost"}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        trainer = Trainer(
            model, TrainingArguments(**arguments), train_dataset=Rows(), callbacks=[callback]
        )
        assert trainer.args.world_size == size
        trainer.train()
    else:
        shard(model, ranks.here(), cpu)
        with single_process(cpu):
            trainer = Trainer(
                model, TrainingArguments(**arguments), train_dataset=Rows(), callbacks=[callback]
            )
            trainer.train()
    assert callback.result is not None
    given = {"objectives": ["ga", "npo(beta=0.5)"], "reference_model": str(reference)}
    last = gf.profile(model, None, **SETS, **given)
    return callback.result, last, sorted(f.name for f in (folder / kind).rglob("*.nc"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_ranks_probe_and_one_writes(kind, tmp_path):
    before = build("llama")
    before.save_pretrained(tmp_path / "before")
    given = {"objectives": ["ga", "npo(beta=0.5)"], "reference_model": build("llama")}
    first = gf.profile(before, None, **SETS, **given)
    for result, last, files in on_ranks(2, trained, tmp_path, kind):
        assert result.step.values.tolist() == [0, 1, 2]
        assert files == ["results.nc", *(f"step-{step:08d}.nc" for step in range(3))]
        for step, expected in ((0, first), (2, last)):
            found = result.g_effect.sel(step=step)
            assert abs(found - expected.g_effect).max() <= 2e-6 * abs(expected.g_effect).max()
        assert abs(result.measured_change.sel(step=2)).min() > 1e-6
        near = abs(result.predicted_update - result.measured_change).sel(step=[1, 2])
        assert near.max() < 0.5 * abs(result.measured_change).max()
