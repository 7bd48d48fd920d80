"""A model that ranks share out is read by the first rank alone, and equals its file bit by bit."""

import json
import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from models import build, shaken
from ranked import commanded, on_ranks
from torch.multiprocessing.reductions import StorageWeakRef

from geffect_fast import ranks
from geffect_fast.capture.compat import is_sharded
from geffect_fast.errors import InputError
from geffect_fast.measure import by_config
from geffect_fast.measure.by_config import load_by_config
from geffect_fast.measure.models import load_model, load_parts
from geffect_fast.ranks import Ranks

CPU = torch.device("cpu")
KINDS = ("llama", "llama_tied", "gpt2", "qwen2_moe")
NAMES = (*KINDS, "adapter", "own", "turned")
CODE = """
from transformers import LlamaForCausalLM

class OwnForCausalLM(LlamaForCausalLM):
    pass
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of models of every kind, an adapter, and a model with its code beside it."""
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        build(kind, torch.bfloat16 if kind == "llama" else torch.float32).save_pretrained(
            folder / kind
        )
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter = peft.get_peft_model(load_model(folder / "llama"), settings)
    shaken(adapter)
    adapter.save_pretrained(folder / "adapter")
    own = shutil.copytree(folder / "llama", folder / "own")
    (own / "own.py").write_text(CODE)
    config = json.loads((own / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.OwnForCausalLM"}
    (own / "config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "gpt2", folder / "turned")
    return folder


def turned(model):
    """A model with a weight that lies column by column in memory, as a loader may leave it."""
    weight = model.get_input_embeddings().weight
    weight.data = weight.data.T.contiguous().T
    return model


def described(model):
    """A model's tensors, and other state that must agree."""
    tensors = {
        name: x.full_tensor() if hasattr(x, "full_tensor") else x.clone()
        for name, x in (*model.named_parameters(), *model.named_buffers())
    }
    return {
        "tensors": {
            name: (x.dtype, x.detach().view(torch.uint8).numpy().tobytes())
            for name, x in tensors.items()
        },
        "names": [name for name, _ in model.named_parameters(remove_duplicate=False)],
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
        "kind": type(model).__qualname__.removeprefix("FSDP"),
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "training": [module.training for module in model.modules()],
    }


def reads(*_, **__):
    raise AssertionError("a rank but the first reads a model")


def in_parts(folder, own_cache):
    """Models in parts, which the first rank alone reads.

    Beside each: the most bytes of whole weights that this rank held besides its part.
    """
    send, held, most = Ranks.send, [], 0

    def sending(self, tensor):
        nonlocal most
        held.append(StorageWeakRef(tensor.untyped_storage()))
        held[:] = [each for each in held if not each.expired()]
        sizes[held[-1].cdata] = tensor.nbytes
        most = max(most, sum(sizes[each.cdata] for each in held))
        send(self, tensor)

    found = {}
    with pytest.MonkeyPatch.context() as patch, ranks.here().together("load"):
        patch.setattr(Ranks, "send", sending)
        # Each rank has a cache of modules of its own, as on a separate machine.
        patch.setattr(
            "transformers.dynamic_module_utils.HF_MODULES_CACHE", f"{own_cache}/{dist.get_rank()}"
        )
        if dist.get_rank():
            patch.setattr(transformers.PreTrainedModel, "from_pretrained", reads)
            patch.setattr(peft.PeftModel, "from_pretrained", reads)
        for name in NAMES:
            sizes, most = {}, 0
            more = {"adapted": turned} if name == "turned" else {}
            model = load_parts(folder / name, "auto", CPU, "model", name == "own", **more)
            assert is_sharded(model)
            found[name] = described(model), most
    return found


def largest_group(model):
    """Bytes of the largest block of a model, or of the rest, which are whole at one time."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = [sum(p.nbytes for p in block.parameters()) for block in max(lists, key=len)]
    return max(*blocks, sum(p.nbytes for p in model.parameters()) - sum(blocks))


def test_parts_are_those_of_the_whole(models, tmp_path):
    first, *others = on_ranks(3, in_parts, models, tmp_path)
    for name in NAMES:
        whole = load_model(models / name, trust_remote_code=name == "own")
        expected = described(whole)
        for found in (first, *others):
            assert found[name][0] == expected, name
        for found in others:
            assert 0 < found[name][1] <= largest_group(whole), name


def chosen(folder, device_bytes):
    """Whether a model is shared out where only rank 1 lacks memory, and the files read."""
    config = SimpleNamespace(shard="auto", dtype="auto", trust_remote_code=False)
    read, seen = by_config.load_model, []

    def reading(source, dtype, device, *args, **kwargs):
        seen.append(device)
        return read(source, dtype, device, *args, **kwargs)

    own = device_bytes if dist.get_rank() else 2**40
    with pytest.MonkeyPatch.context() as patch, ranks.here().together("load"):
        patch.setattr(by_config, "free_memory", lambda _: own)
        patch.setattr(by_config, "load_model", reading)
        return is_sharded(load_by_config(folder, config, CPU)), seen


def test_auto_decides_before_weights_are_read(models):
    folder = models / "adapter"
    n_bytes = 2 * sum(p.nbytes for p in load_model(folder).parameters()) / by_config.PART_FOR_MODEL
    assert on_ranks(2, chosen, folder, n_bytes - 2) == [(True, ["meta"]), (True, [])]
    assert on_ranks(2, chosen, folder, n_bytes + 2) == [(False, ["meta", "cpu"]), (False, ["cpu"])]


def failing(study, folder, broken):
    """Messages about models that the first rank cannot read, and whether the ranks go on."""
    words = ["profile", "--forget", f"{study}/forget.jsonl", "--retain", f"{study}/retain.jsonl"]
    words += ["--objectives", "npo", "--quiet", "--shard", "fsdp", "--out", f"{folder}/run"]
    found = [
        commanded([*words, "--model", broken]),
        commanded([*words, "--model", f"{study}/model", "--reference", broken]),
    ]

    def fails(model):
        raise ValueError("no luck")

    for error, more in ((InputError, {}), (Exception, {"adapted": fails})):
        source = f"{study}/model" if more else broken
        with pytest.raises(error) as caught, ranks.here().together("load"):
            load_parts(source, "auto", CPU, "model", False, **more)
        found.append((type(caught.value).__name__, str(caught.value)))
    return found, commanded(
        [*words, "--model", f"{study}/model", "--reference", f"{study}/reference"]
    )


def test_an_error_of_the_first_ends_all_and_leaves_them_whole(study, tmp_path):
    broken = shutil.copytree(study / "model", tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (own, after), (others, also_after) = on_ranks(2, failing, study, tmp_path, str(broken))
    for (code, said), (other_code, other_said), what in zip(
        own, others, ("model", "reference"), strict=False
    ):
        assert code == other_code == 2
        assert said.startswith(f"error: {what} {broken}: its weights are truncated or broken")
        assert other_said == said.replace("error: ", "error: rank 0: ")
    assert others[2] == ("InputError", f"rank 0: {own[2][1]}")
    assert own[3:] == [("ValueError", "no luck")]
    assert others[3:] == [("GEffectError", "rank 0: ValueError: no luck")]
    assert after[0] == also_after[0] == 0
