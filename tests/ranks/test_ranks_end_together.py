"""An error on one rank ends the call on all ranks, with a line that names it, and no hang."""

import gc
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from models import build, samples
from ranked import Raised, on_ranks

import geffect_fast as gf
from geffect_fast import ranks
from geffect_fast.engines import reverse
from geffect_fast.engines.batches import TokenBudget
from geffect_fast.measure.memory import within_budget

ROWS = {"forget": samples([5, 9, 7, 4], 0), "retain": samples([8, 6, 6], 1)}


def profiled(model=None, **given):
    given = {"objectives": ["ga"], "resolve": ("sample",), "token_budget": 12, **ROWS} | given
    return gf.profile(model or build("llama"), None, **given)


SAID = {
    "objectives": "rank 1 has wga, and rank 0 ga; give all ranks the same",
    "forget": "rank 1 has 4 rows of digest ",
    "reduction": "rank 1 has sum, and rank 0 token; give all ranks the same",
    "reference_model": "rank 1 has LlamaForCausalLM, and rank 0 none; give all ranks the same",
    "probes": "rank 1 has forget, retain, general, and rank 0 forget, retain; give all",
    "model": "model.embed_tokens.weight is not the same on rank 1 as on rank 0; load the same",
}


def other_arguments():
    others = {
        "objectives": {"objectives": ["wga"]},
        "forget": {"forget": samples([5, 9, 7, 4], 3)},
        "reduction": {"reduction": "sum"},
        "reference_model": {"reference_model": build("llama", seed=3)},
        "probes": {"probes": {"general": ROWS["retain"]}},
        "model": {"model": build("llama", seed=1)},
    }
    said = {}
    for name in SAID:
        given = others[name] if dist.get_rank() == 1 else {}
        if name == "reference_model":
            given = given | {"objectives": ["npo"]}
        with pytest.raises(gf.errors.InputError) as error:
            profiled(**given)
        said[name] = str(error.value)
    return said


def test_ranks_are_given_the_same():
    for found in on_ranks(2, other_arguments):
        for name, start in SAID.items():
            assert found[name].startswith(f"{name}: {start}")


def one_fails(how):
    model = build("llama")
    if dist.get_rank() == 1:

        def fails(*_):
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no luck\nat all")

        if how == "nan":
            with torch.no_grad():
                model.lm_head.weight[3, 2] = torch.nan
        else:
            reverse.model_outputs = fails  # once the risks' gradients are there
    return profiled(model)


def test_an_error_of_ours_ends_all():
    others = on_ranks(3, one_fails, "nan", fails=True)
    assert {found.kind for found in others} == {"NonFiniteError"}
    own = others.pop(1)
    assert own.said.startswith("model: lm_head.weight holds 1 NaN")
    assert {found.said for found in others} == {f"rank 1: {own.said}"}


def test_an_error_of_anyone_ends_all():
    first, own = on_ranks(2, one_fails, "raises", fails=True)
    assert (own.kind, own.said) == ("ValueError", "no luck\nat all")
    assert (first.kind, first.said) == ("GEffectError", "rank 1: ValueError: no luck at all")


def test_a_rank_that_is_killed_ends_all():
    first, killed = on_ranks(2, one_fails, "killed", fails=True)
    assert killed is None
    assert first.kind == "GEffectError"
    assert first.said.startswith("a rank of the process group has ended")


def not_all_call(what):
    ranks.PATIENCE = timedelta(seconds=3)
    if what != "none":
        ranks.here()
    if dist.get_rank() == 0:
        return profiled()
    if what == "another":
        with ranks.here().together("sweep"):
            pass
    return "did not"


def test_all_ranks_must_call_it():
    first, _ = on_ranks(2, not_all_call, "none", fails=True)
    assert first.kind == "InputError"
    assert first.said.startswith(
        "geffect_fast: not all 2 ranks of the process group called it within"
    )
    for found in on_ranks(2, not_all_call, "another", fails=True):
        assert found.said == (
            "profile: rank 1 calls sweep at the same time; call the same on every rank"
        )


def by_itself():
    if dist.get_rank() == 1:
        with gf.ranks.on_its_own():
            return profiled().g_effect.values
    return None


def test_one_rank_may_measure_by_itself():
    _, found = on_ranks(2, by_itself, fails=True)
    assert not isinstance(found, Raised), found
    assert (found == profiled().g_effect.values).all()


def streamed(file):
    found = profiled(out=file, resolve=("sample", "token"))
    return found.load()


def test_one_rank_writes_the_file_that_all_read(tmp_path):
    file = tmp_path / "large.nc"
    alone = profiled(resolve=("sample", "token"))
    for found in on_ranks(2, streamed, file):
        assert abs(found.g_effect - alone.g_effect).max() < 1e-6 * abs(alone.g_effect).max()
        assert found.identical(gf.open_run(file).load())
    assert [f.name for f in tmp_path.iterdir()] == ["large.nc"]


def ended():
    """References to a process group that the program has ended, and the message on using it."""
    kept = gf.ranks.here()
    groups = kept._groups
    torch.distributed.destroy_process_group()
    gc.collect()
    with pytest.raises(gf.errors.InputError) as error:
        kept.meet()
    return [group() is None for group in groups], str(error.value)


def test_nothing_holds_a_group_that_has_ended():
    """At exit, torch would abort the process."""
    for gone, said in on_ranks(2, ended):
        assert gone == [True, True]
        assert said.startswith("process group: it has ended; begin another one")


def lacking():
    """The message where rank 1 lacks memory, and whether ranks still exchange data."""
    here = gf.ranks.here()
    with (
        pytest.raises(gf.errors.OutOfMemoryError) as error,
        here.together("work"),
        within_budget(TokenBudget(8)),
    ):
        if here.rank == 1:
            raise torch.OutOfMemoryError("none left")
        here.meet()
    with here.together("more work"):
        return str(error.value), here.meet(here.rank)


def test_what_was_told_is_not_told_again():
    own = "out of memory with a token budget of 8; give a smaller one, such as --token-budget 4"
    (said, met), (other, _) = on_ranks(2, lacking)
    assert other.startswith(own)
    assert said == f"rank 1: {other}"
    assert met == [0, 1]


def first_fails_in_step():
    """The message where the first rank is late and fails at a meeting between exchanges."""
    here = gf.ranks.here()

    def fails():
        raise gf.errors.InputError("no luck: try again")

    with pytest.raises(gf.errors.InputError) as error, here.together("work"), here.in_step(True):
        try:
            here.by_first(fails)
        finally:
            time.sleep(0.3 * here.first)
    return str(error.value)


def test_a_rank_that_fails_at_a_meeting_is_named_once():
    said = "no luck: try again"
    assert on_ranks(2, first_fails_in_step) == [said, f"rank 0: {said}"]
