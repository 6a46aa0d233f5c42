"""The "parameters" text, in which most tools of the field write and read how a picture was made.

It has the prompt, the negative prompt, and a last line of settings `Name: value, …`. Its readers (the rules are those of
AUTOMATIC1111's web UI) strip each line, begin the negative prompt at a line that begins so, take a value in quotes for
JSON, and know samplers by names of their own. So free text is laid out, and none of it is taken for anything else.
"""

from __future__ import annotations

import json
from typing import Any

from . import schedulers

_NEGATIVE = "Negative prompt:"
# Tokenizers see no difference, and readers do not take it for the start of a negative prompt.
_NO_NEGATIVE = "Negative  prompt:"


def parameters_text(record: dict[str, Any]) -> str:
    """The prompt, the negative prompt, and a line of settings, for a record as `encode` embeds it."""
    sampler, schedule = schedulers.label(record["scheduler"])
    settings = {
        "Steps": record["steps"],
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": f"{record['guidance_scale']:g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": record["model"],
    }
    if "variation_seed" in record:
        settings["Variation seed"] = record["variation_seed"]
        settings["Variation seed strength"] = f"{record['variation_strength']:g}"
    if "strength" in record:
        settings["Denoising strength"] = f"{record['strength']:g}"
    if checksum := record["environment"].get("checksum"):
        settings["Model hash"] = checksum[:10]
    settings["Version"] = f"starweave_image {record['environment']['starweave_image']}"
    text = ""
    for name, beginning in (("prompt", ""), ("negative_prompt", f"{_NEGATIVE} ")):
        if not (given := record[name]):
            continue
        laid_out = _laid_out(given)
        text += f"{beginning}{laid_out}\n"
        if _read(laid_out) != given:
            # Readers drop white space at the ends of lines. They read settings last, which override the text.
            settings[name.capitalize().replace("_", " ")] = given
    return text + ", ".join(f"{name}: {_value(value)}" for name, value in settings.items())


def _laid_out(text: str) -> str:
    lines = text.split("\n")
    return "\n".join(
        line.replace(_NEGATIVE, _NO_NEGATIVE, 1) if line.strip().startswith(_NEGATIVE) else line
        for line in lines
    )


def _read(text: str) -> str:
    """The text as it is read back: lines are stripped, and there is none ahead of the first that is not empty."""
    return "\n".join(line.strip() for line in text.split("\n")).lstrip("\n")


def _value(value: Any) -> str:
    """A setting's value, in quotes if it could not be read back otherwise."""
    text = str(value)
    plain = text and text == text.strip() and not any(character in text for character in ',:"\n')
    return text if plain else json.dumps(text, ensure_ascii=False)
