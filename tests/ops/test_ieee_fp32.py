"""fp32 keeps its bits inside, and torch's switches are left as they were."""

import pytest
import torch
from torch import backends

from geffect_fast import ops
from geffect_fast.ops import schema
from geffect_fast.ops.ieee_fp32 import ieee_fp32, products_are_ieee

SWITCHES = {
    "all": backends,
    "cuda.matmul": backends.cuda.matmul,
    "cudnn": backends.cudnn,
    "cudnn.conv": backends.cudnn.conv,
    "cudnn.rnn": backends.cudnn.rnn,
    "mkldnn.matmul": backends.mkldnn.matmul,
    "mkldnn.conv": backends.mkldnn.conv,
    "mkldnn.rnn": backends.mkldnn.rnn,
}
ORDERS = {
    "none": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
    "all": lambda: setattr(backends, "fp32_precision", "tf32"),
    "cuda.matmul": lambda: setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn.matmul": lambda: setattr(backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "no tf32 in cudnn": lambda: setattr(backends.cudnn, "allow_tf32", False),
    "conv": lambda: setattr(backends.cudnn.conv, "fp32_precision", "ieee"),
}


@pytest.fixture(autouse=True)
def as_torch_has_them():
    yield
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    backends.fp32_precision = "none"
    for name in ("cuda.matmul", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"):
        SWITCHES[name].fp32_precision = "none"


def said_by_torch():
    """The state of torch's switches; "refused" where they contradict each other."""
    said = {name: switch.fp32_precision for name, switch in SWITCHES.items()}
    for name, ask in (
        ("products", torch.get_float32_matmul_precision),
        ("allow_tf32", lambda: backends.cuda.matmul.allow_tf32),
        ("convolutions", lambda: backends.cudnn.allow_tf32),
    ):
        try:
            said[name] = ask()
        except RuntimeError:
            said[name] = "refused"
    return said


@pytest.mark.parametrize("order", ORDERS)
def test_all_bits_inside_and_every_switch_as_before_outside(order):
    ORDERS[order]()
    before = said_by_torch()
    with pytest.raises(KeyError), ieee_fp32():
        inside = said_by_torch()
        with ieee_fp32():
            assert products_are_ieee()
        assert products_are_ieee()
        raise KeyError
    assert said_by_torch() == before
    own = {name: said for name, said in inside.items() if name not in ("all", "cudnn")}
    assert set(own.values()) == {"ieee", "highest", False}


def test_a_switch_that_follows_another_follows_it_still():
    backends.fp32_precision = "tf32"
    with ieee_fp32():
        pass
    assert backends.cuda.matmul.fp32_precision == "tf32"
    backends.fp32_precision = "ieee"
    assert backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("order", ["high", "cuda.matmul", "mkldnn.matmul", "all"])
def test_products_that_drop_bits_are_seen(order):
    assert products_are_ieee()
    ORDERS[order]()
    assert not products_are_ieee()


def test_ops_keep_all_bits(monkeypatch):
    seen = []
    plain = schema.REFERENCES["ghost_norm"]

    def seen_running(*args):
        seen.append(torch.get_float32_matmul_precision())
        return plain(*args)

    monkeypatch.setitem(schema.REFERENCES, "ghost_norm", seen_running)
    torch.set_float32_matmul_precision("high")
    a, g = torch.randn(2, 5, 3)
    with ops.force_reference():
        ops.ghost_norm(a, g, torch.tensor([0, 5], dtype=torch.int32))
    assert seen == ["highest"]
    assert torch.get_float32_matmul_precision() == "high"
