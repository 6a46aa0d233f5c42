"""What all results of one request have in common: what is drawn, in which size, and the record of its parameters."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import ImageOps
from PIL.Image import Image

from .. import schema
from ..pictures import images, schedulers
from ..pictures.preview import Previews
from ..tasks import reading, registry
from ..tasks.call import Call, Given, Text
from ..tasks.settings import Settings, fitted
from ..tasks.task import File
from ..weights.cache import Model
from ..weights.catalog import ModelCard, rendered_size


@dataclass(frozen=True)
class Result:
    """One result as a file; `told` has the message fields that are specific to its kind."""

    data: bytes
    record: dict[str, Any]
    part: type[schema.ImagePart] | type[schema.ResultPart]
    told: dict[str, Any]

    def parts(self, id: str, index: int) -> Iterator[schema.ImagePart | schema.ResultPart]:
        """The messages with the file's parts, in order."""
        whole, digest = memoryview(self.data), hashlib.sha256(self.data).hexdigest()
        seed = self.record.get("variation_seed", self.record["seed"])
        for offset in range(0, len(self.data), schema.MAX_PART):
            yield self.part(
                id=id,
                index=index,
                seed=seed,
                **self.told,
                sha256=digest,
                size=len(self.data),
                offset=offset,
                data=whole[offset : offset + schema.MAX_PART],
            )


class Plan:
    """`base_seed` is the seed of the first picture, or of the picture that variations start from; `scheduler` is the
    resolved name; `environment` has everything besides the request that determines the picture."""

    def __init__(
        self,
        request: schema.Request,
        card: ModelCard,
        settings: Settings,
        model: Model,
        environment: dict[str, Any],
        pictures: list[Image],
        mask: Image | None,
        base_seed: int,
        scheduler: str | None,
        tell: Callable[[schema.Event], None],
    ) -> None:
        self.request = request
        self.base_seed = base_seed
        self.card = card
        self.settings = settings
        self.model = model
        self.notices = list(settings.notices)
        self._environment = environment
        if scheduler is None:
            own = model.pipeline.scheduler
            wanted = request.scheduler or card.defaults.scheduler
            scheduler = schedulers.resolve(wanted, type(own).__name__, own.config, settings.steps, card.id)
        self.scheduler = scheduler
        style = request.style.strip()
        self._prompt = f"{request.prompt}, {style}" if style else request.prompt
        self.width, self.height = rendered_size(settings.width, settings.height, card)
        rendered, size = (self.width, self.height), (settings.width, settings.height)
        if rendered != size:
            self.note(
                f"Rendered at {self.width}x{self.height} and enlarged: {card.name} draws at that scale only."
            )
        self.previews = None
        if request.preview and model.offloaded:
            self.note("No previews: the model does not fit on its device as a whole.")
        elif request.preview:
            self.previews = Previews(request.id, model.pipeline, rendered, size, tell)
        known = reading.vocabulary(model.folder)
        self._said = self._read("prompt", self._prompt, known)
        self._unwanted = self._read("negative_prompt", request.negative_prompt, known)
        self._pictures, self._mask = pictures, mask

    def _read(self, field: str, typed: str, known: reading.Vocabulary | None) -> str:
        """The text as the model reads it. The record keeps the text as typed."""
        # Compose letters and their accents, as in the models' training data.
        text = unicodedata.normalize("NFC", typed)
        if known is None or not text.strip():
            return text
        read = reading.read(text, known)
        first, *others = read.notices(self.card.name, field) or [""]
        if field == "prompt" and (read.dropped or read.is_empty):
            first = (
                f"{first} {self.card.description} For anything else choose a larger model, such as "
                "stable-diffusion-v1-5/stable-diffusion-v1-5: with `mix image.gen --model`, or in the option `models`."
            )
        self.note(*filter(None, [first, *others]))
        return read.text

    def prepare(self, pipeline: Any) -> tuple[Any, Call]:
        """The pipeline for this task, over the parts of `pipeline`, and its call."""
        text = Text(
            self._said,
            self._unwanted,
            self.width,
            self.height,
            self.settings.steps,
            self.settings.guidance_scale,
            self.request.guidance_scale is not None,
        )
        rendered = self.width, self.height
        # The first picture gets the size to draw in; further ones keep their proportions.
        sizes = [rendered, *(fitted(image.size, self.card.limits) for image in self._pictures[1:])]
        given = Given(
            text,
            [images.resize(image, *size) for image, size in zip(self._pictures, sizes, strict=False)],
            self._mask and images.resize(self._mask, *rendered),
            self.request.strength,
        )
        pipeline = registry.derive(pipeline, self.settings.task)
        return pipeline, registry.prepare(pipeline, self.settings.task, given)

    def result(self, made: Image | File, seed: int, scheduler: str) -> Result:
        """The result made with this seed, as a file with its record."""
        record = self._record(seed, scheduler)
        if isinstance(made, File):
            told = {"kind": self.settings.task.kind, "media_type": made.media_type, "facts": made.facts}
            return Result(made.data, record, schema.ResultPart, told)
        request, size = self.request, {"width": self.settings.width, "height": self.settings.height}
        data = images.encode(
            self._finished(made), request.format, request.quality, record if request.metadata else None
        )
        return Result(data, record, schema.ImagePart, {"format": request.format, **size})

    def _finished(self, picture: Image) -> Image:
        """The picture in the requested size; where a mask is black, it has exactly the original's pixels."""
        size = self.settings.width, self.settings.height
        picture = images.resize(picture, *size)
        if self._mask is not None:
            original, mask = images.resize(self._pictures[0], *size), images.resize(self._mask, *size)
            picture.paste(original, mask=ImageOps.invert(mask))
        return picture

    def _record(self, seed: int, scheduler: str) -> dict[str, Any]:
        settings = self.settings
        return {
            "prompt": self._prompt,
            "negative_prompt": self.request.negative_prompt,
            "model": self.card.id,
            "width": settings.width,
            "height": settings.height,
            "rendered_width": self.width,
            "rendered_height": self.height,
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "scheduler": scheduler,
            "environment": self._environment,
            **self._seeded(seed),
            **self._origin(),
        }

    def _seeded(self, seed: int) -> dict[str, Any]:
        """The record's entries about the noise, given the picture's own seed."""
        if self.request.variation_strength is None:
            return {"seed": seed}
        return {
            "seed": self.base_seed,
            "variation_seed": seed,
            "variation_strength": self.request.variation_strength,
        }

    def _origin(self) -> dict[str, Any]:
        """The record's entries about the input pictures."""
        digests = [hashlib.sha256(data).hexdigest() for data in self.request.pictures]
        if not digests:
            return {}
        origin: dict[str, Any] = {"task": self.settings.task.name, "strength": self.request.strength}
        origin |= {"image_sha256": digests[0]} if len(digests) == 1 else {"images_sha256": digests}
        if self.request.mask is not None:
            origin["mask_sha256"] = hashlib.sha256(self.request.mask).hexdigest()
        return origin

    def note(self, *sentences: str) -> None:
        self.notices += [sentence for sentence in dict.fromkeys(sentences) if sentence not in self.notices]
