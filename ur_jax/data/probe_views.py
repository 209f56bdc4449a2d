"""What a linear probe sees of an image: a crop, random or central, then its corruption.

Made on the host from the decoded image, in 8 bits by Pillow, before the encoder's own resizing: the
order and the bytes of the reference pipeline.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math

import numpy as np
from PIL import Image

from ur_jax.checks import check_number, check_range, check_type, whole_number
from ur_jax.data.corruptions import CORRUPTIONS, ViewConfig
from ur_jax.data.pixels import check_image, prepare, resize
from ur_jax.data.sources import Example, ImageSource
from ur_jax.encoders.base import Encoder

_PAPER_SIZE = 224
_NUM_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """The distribution of a random crop; the defaults are the paper's for probes.

    Attributes:
      area: range of the cropped fraction of the image's area, in (0, 1].
      aspect: range of the crop's width / height, log-uniform, > 0.
      flip_probability: how often left and right are exchanged.
    """

    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5

    def __post_init__(self):
        check_range(self, "area", above=0.0, most=1.0)
        check_range(self, "aspect", above=0.0)
        check_number(self, "flip_probability", least=0.0, most=1.0)


class ProbeViews(ImageSource):
    """The images of a source as a probe sees them: cropped to `size`, then corrupted.

    A view depends on the image, its index, `seed` and `draw` alone. Load them with the encoder's
    `input_size` and this source's `preparation`.

    An encoder for 224 pixels gets the paper's crops, 224x224: random, or the centre once the
    shorter side is 256. Any other gets crops of its own input size, and whole images where the crop
    is not random, prepared as the encoder wants them.

    Attributes:
      size: height and width of a view in pixels.
      preparation: what brings a view to the encoder's input, see `data.prepare`.
    """

    def __init__(
        self,
        source: ImageSource,
        encoder: Encoder,
        config: ViewConfig,
        *,
        random: bool,
        seed: int = 0,
        draw: int = 0,
    ):
        """Wraps a source.

        Args:
          source: from `open_images`.
          encoder: whose input size and preparation to respect.
          config: the kind of view.
          random: whether crops and flips are random, for training.
          seed: of everything random.
          draw: number of the draw; 0 is for testing, training counts from 1.
        """
        check_type("source", source, ImageSource)
        check_type("encoder", encoder, Encoder)
        check_type("config", config, ViewConfig)
        check_type("random", random, bool)
        seed, draw = whole_number(seed, "seed", least=0), whole_number(draw, "draw", least=0)
        self.spec, self.class_names = source.spec, source.class_names
        is_paper = encoder.input_size[0] == _PAPER_SIZE
        self.size = (_PAPER_SIZE, _PAPER_SIZE) if is_paper else encoder.input_size
        self.preparation = encoder.preparation if is_paper else "resize"
        self._whole = "resize_crop" if is_paper else encoder.preparation
        self._source, self._config, self._random = source, config, random
        self._key = (seed, draw)

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def label(self, index: int) -> int:
        return self._source.label(index)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        rng = np.random.default_rng([*self._key, index])
        if self._random:
            view = random_view(example.pixels, rng, self.size)
        else:
            view = Image.fromarray(
                prepare(example.pixels, input_size=self.size, preparation=self._whole)
            )
        corrupted = CORRUPTIONS[self._config.kind](np.asarray(view), rng, self._config)
        return example._replace(pixels=Image.fromarray(corrupted))

    @functools.cached_property
    def content_hash(self) -> str:
        """16 hex digits over the source's content and what is done to it."""
        settings = dataclasses.astuple(self._config), self._random, self._key, self.size
        described = repr((self._source.content_hash, settings, self._whole))
        return hashlib.sha256(described.encode()).hexdigest()[:16]


def random_view(
    image: Image.Image,
    rng: np.random.Generator,
    size: tuple[int, int],
    config: CropConfig = CropConfig(),
) -> Image.Image:
    """Cuts out a random box, resizes it to size = (H, W) and flips it by chance.

    Args:
      image: an RGB image of any size.
      rng: draws the box and the flip.
      size: of the view.
      config: distribution of the box and the flip.
    """
    check_image(image)
    check_type("rng", rng, np.random.Generator)
    check_type("config", config, CropConfig)
    top, left, height, width = random_box(rng, image.height, image.width, config)
    view = resize(image.crop((left, top, left + width, top + height)), size)
    flip = rng.random() < config.flip_probability
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view


def random_box(
    rng: np.random.Generator, height: int, width: int, config: CropConfig
) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width) of a box, in pixels, as `training.views` does.

    An area fraction and a logarithmic aspect ratio are uniform in their ranges; the first of ten
    boxes that fits is placed uniformly, else the largest central one with a ratio in range taken.
    """
    low, high = config.aspect
    for _ in range(_NUM_ATTEMPTS):
        area = height * width * rng.uniform(*config.area)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = rng.integers(height - box_height + 1), rng.integers(width - box_width + 1)
            return int(top), int(left), box_height, box_width
    box_height, box_width = min(height, round(width / low)), min(width, round(height * high))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
