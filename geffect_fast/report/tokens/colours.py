"""Levels of effects, nine on either side of zero, and their colours in terminals and in HTML."""

from __future__ import annotations

import os
import unicodedata

import numpy as np

from geffect_fast.results.risks import UNLEARN

STEPS = 9
"""Levels run from -STEPS to STEPS, so that without colour a level is one digit."""

UNDEFINED = STEPS + 1
"""The level of an effect that is NaN or infinite."""

QUANTILE, FLOOR = 0.95, 0.1
SCALE_NOTE = (
    f"the {100 * QUANTILE:.0f}th percentile of the sizes of all tokens shown, at least a tenth of "
    "the largest"
)

GROUND = {"light": "#ffffff", "dark": "#15181d"}
INK = {"light": "#1b1b1b", "dark": "#f2f2f2"}
# Blue and orange have the same lightness (Oklch 0.72 on light ground, 0.52 on dark). Every kind of
# colour vision tells them apart, and neither looks like more than the other.
GROUND_WANTED = {"light": "#43acfb", "dark": "#196ea9"}
GROUND_UNWANTED = {"light": "#e78b30", "dark": "#9c5313"}
SHADES_OF_256 = {
    "light": {True: (195, 153, 75), False: (230, 223, 215)},
    "dark": {True: (17, 24, 26), False: (58, 94, 130)},
}
"""Wanted (True) and unwanted grounds from weak to strong, in a terminal's table of 256 colours."""


def robust_scale(values: np.ndarray) -> float:
    """The size that full colour stands for; 0 where no value is finite and nonzero.

    The size is a quantile, so that a few large tokens do not make the others pale. It is at least a
    tenth of the largest, for answers where most tokens are rounding noise beside the largest.
    """
    sizes = np.abs(values[np.isfinite(values)])
    if not sizes.size:
        return 0.0
    return float(max(np.quantile(sizes, QUANTILE), FLOOR * sizes.max()))


def levels(values: np.ndarray, scale: float) -> np.ndarray:
    """Levels of effects, in ninths of the scale: int64 from -STEPS to STEPS, or `UNDEFINED`."""
    finite = np.isfinite(values)
    ratio = np.where(finite, values, 0.0) / (scale or 1.0)
    return np.where(finite, np.rint(STEPS * np.clip(ratio, -1, 1)), UNDEFINED).astype(np.int64)


def goodness(risk: str, level: int) -> int:
    """The level, made negative where the effect is unwanted: e_u above zero, any other below."""
    return -level if risk == UNLEARN and level != UNDEFINED else level


def colour(good: int, theme: str) -> str:
    """The background of a token, `#rrggbb`.

    Args:
        good: a level that `goodness` returns; 0 gives the ground of the page.
        theme: `light` or `dark`. The text on the background has the colour `INK[theme]`.
    """
    pole = (GROUND_WANTED if good > 0 else GROUND_UNWANTED)[theme]
    weight = min(abs(good), STEPS) / STEPS
    mixed = [
        round(
            int(GROUND[theme][at : at + 2], 16) * (1 - weight) + int(pole[at : at + 2], 16) * weight
        )
        for at in (1, 3, 5)
    ]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def mark(risk: str, level: int) -> str:
    """The mark that stands in for a colour: `-9` to `+9`, with `!` where the effect is unwanted.

    The mark of a zero level is `·`, and that of an undefined effect `?`.
    """
    if level == UNDEFINED:
        return "?"
    if level == 0:
        return "·"
    return f"{level:+d}" + ("!" if goodness(risk, level) < 0 else "")


def terminal_theme() -> str:
    """`light` where the terminal reports a light background, as a few do, else `dark`."""
    background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return "light" if background in ("7", *map(str, range(9, 16))) else "dark"


def visible(text: str, token_id: int) -> str:
    """A token's text, with all characters shown that are invisible or change the text around them.

    A newline becomes `↵` and the newline. Other control characters become their pictures.
    Characters that are invisible, unassigned or reverse the text become their numbers. A token
    without text becomes its id.
    """
    if not text:
        return f"⟨{token_id}⟩"
    return "".join(_visible(character, alone=len(text) == 1) for character in text)


def inline(text: str) -> str:
    """A visible token within a sentence, without spaces around it; spaces alone become `␣` each."""
    flat = text.replace("\n", "")
    return flat.strip() or "␣" * len(flat)


def _visible(character: str, alone: bool) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥"
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    kind = unicodedata.category(character)
    joins = character in "\u200c\u200d" and not alone  # as in Persian and emoji
    if kind in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and not joins:
        return f"⟨U+{code:04X}⟩"
    return character
