"""Objectives at random: every kind of parameter, sums, differences and multiples."""

from hypothesis import strategies as st

from geffect_fast.objectives import (
    CEU,
    GA,
    GD,
    KL,
    NLL,
    NPO,
    PDU,
    PO,
    RMU,
    RR,
    UNDIAL,
    WGA,
    WTNPO,
    AltPO,
    RMUMask,
    SatImp,
    SimNPO,
    TokenWeights,
)

positive = st.floats(min_value=1e-300, max_value=1e300)
non_negative = st.floats(min_value=0, max_value=1e300)
any_number = st.floats(allow_nan=False, allow_infinity=False)
layers = st.integers(min_value=0, max_value=2**63 - 1)

ELEMENTARY = st.one_of(
    st.sampled_from([GA(), NLL(), PO(), KL(), NPO(), GD(), RMU()]),
    st.builds(WGA, non_negative),
    st.builds(NPO, beta=positive),
    st.builds(GD, alpha=non_negative),
    st.builds(WTNPO, positive, alpha=non_negative),
    st.builds(SimNPO, delta=any_number),
    st.builds(SatImp, non_negative, non_negative),
    st.builds(PDU, eps=non_negative, dual=non_negative),
    st.builds(CEU, layers),
    st.sampled_from([AltPO(), RR(), RMUMask(), UNDIAL(2), TokenWeights()]),
    st.builds(RMU, layer=layers, normalize=st.booleans()),
    st.builds(RMU, layers, positive, st.booleans(), layers),
)
coefficients = st.one_of(
    st.floats(min_value=-1e50, max_value=1e50), st.sampled_from([1, -1, 0, 1.0, 2])
)
OBJECTIVES = st.recursive(
    ELEMENTARY,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a - b, inner, inner),
        st.builds(lambda c, a: c * a, coefficients, inner),
    ),
    max_leaves=6,
)
