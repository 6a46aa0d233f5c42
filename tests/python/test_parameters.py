"""The "parameters" text, read by the rules that its most used reader goes by."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starweave_image.pictures.images import parameters_text


def record(**fields: Any) -> dict[str, Any]:
    return {
        "prompt": "a cat",
        "negative_prompt": "",
        "model": "starweave/tiny",
        "width": 64,
        "height": 48,
        "steps": 25,
        "guidance_scale": 4.5,
        "scheduler": "EulerAncestralDiscreteScheduler",
        "seed": 2**63 - 1,
        "environment": {"starweave_image": "0.1.0", "checksum": "ab" * 32},
    } | fields


def settings_of(line: str) -> dict[str, str]:
    """`Name: value` one after the other: a name is of letters, digits, spaces, hyphens and slashes, a value a JSON string or
    whatever comes before the next comma."""
    found = {}
    while entry := re.search(r'(\w[\w \-/]+):\s*("(?:[^"\\]|\\.)+"|[^,]*)(,|$)', line):
        name, value, _ = entry.groups()
        found[name] = json.loads(value) if value[:1] == value[-1:] == '"' else value
        line = line[entry.end() :]
    return found


def read(text: str) -> dict[str, str]:
    """The last line is the settings if it has at least three. Of the others, each stripped, those from one that begins with
    "Negative prompt:" on are the negative prompt. A setting outdoes what was read before it."""
    lines = text.strip().split("\n")
    settings = settings_of(lines[-1])
    if len(settings) < 3:
        settings = {}
    else:
        del lines[-1]
    parts = {"Prompt": "", "Negative prompt": ""}
    part = "Prompt"
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            part, line = "Negative prompt", line.removeprefix("Negative prompt:").strip()
        parts[part] += ("\n" if parts[part] else "") + line
    return parts | settings


TRAPS = st.sampled_from(
    [
        "Negative prompt:",
        " Negative prompt: x",
        "Negative  prompt:",
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1",
        "Prompt: no",
        "\n",
        "\n\n",
        "\r\n",
        " ",
        "\t",
        '"',
        '\\"',
        "\\",
        ",",
        ":",
        "512x512",
        "<lora:a:1>",
        "\u2028",
        "\x85",
        "\x1c",
        "ä",
        "日本",
        "😀",
    ]
)
TEXT = st.lists(
    TRAPS | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9), max_size=12
).map("".join)


@given(prompt=TEXT.filter(str.strip), negative_prompt=TEXT)
@example("a cat\nNegative prompt: a dog", "blurry")
@example("Negative prompt: a dog", "")
@example("a cat", "Negative prompt:\nNegative prompt: Negative prompt:")
@example(
    "a cat\nSteps: 9, Sampler: Heun, CFG scale: 2, Seed: 3", "Steps: 9, Sampler: Heun, CFG scale: 2, Seed: 3"
)
@example("\n  a cat  \n\n", "\n")
def test_prompts_are_read_back_as_they_were_asked(prompt: str, negative_prompt: str) -> None:
    found = read(parameters_text(record(prompt=prompt, negative_prompt=negative_prompt)))
    assert (found["Prompt"], found["Negative prompt"]) == (prompt, negative_prompt)
    del found["Prompt"], found["Negative prompt"]
    assert found == {
        "Steps": "25",
        "Sampler": "Euler a",
        "Schedule type": "Automatic",
        "CFG scale": "4.5",
        "Seed": "9223372036854775807",
        "Size": "64x48",
        "Model": "starweave/tiny",
        "Model hash": "ababababab",
        "Version": "starweave_image 0.1.0",
    }


@given(prompt=TEXT.filter(str.strip), negative_prompt=TEXT)
def test_readers_of_the_lines_alone_miss_nothing_but_white_space(prompt: str, negative_prompt: str) -> None:
    text = parameters_text(record(prompt=prompt, negative_prompt=negative_prompt))
    lines, _, _ = text.rpartition("\n")
    found = read(lines + "\nSteps: 25, Sampler: Euler a, Seed: 1")
    assert found["Prompt"].split() == prompt.split()
    assert found["Negative prompt"].split() == negative_prompt.split()


@given(model=TEXT.filter(lambda text: text and not re.fullmatch(r"\d+x\d+\n?", text)))
@example('a "model", v1: the best')
@example('"quoted"')
@example("two\nlines")
def test_names_with_commas_quotes_and_colons_stay_one_value(model: str) -> None:
    found = read(parameters_text(record(model=model, negative_prompt="a, b: c")))
    assert (found["Model"], found["Seed"], found["Negative prompt"]) == (model, str(2**63 - 1), "a, b: c")


def test_plain_text_is_laid_out_plainly() -> None:
    text = parameters_text(record(prompt='a "red" cat,\nand a dog', negative_prompt="bad: very"))
    assert text == (
        'a "red" cat,\nand a dog\nNegative prompt: bad: very\n'
        "Steps: 25, Sampler: Euler a, Schedule type: Automatic, CFG scale: 4.5, Seed: 9223372036854775807, "
        "Size: 64x48, Model: starweave/tiny, "
        "Model hash: ababababab, Version: starweave_image 0.1.0"
    )


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        ("EulerDiscreteScheduler", "Sampler: Euler, Schedule type: Automatic"),
        ("PNDMScheduler", "Sampler: PLMS, Schedule type: Automatic"),
        ("DPMSolverMultistepScheduler sde karras", "Sampler: DPM++ 2M SDE, Schedule type: Karras"),
        ("HeunDiscreteScheduler exponential", "Sampler: Heun, Schedule type: Exponential"),
    ],
)
def test_samplers_have_the_names_that_other_tools_know(scheduler: str, told: str) -> None:
    assert f", {told}, " in parameters_text(record(scheduler=scheduler))
