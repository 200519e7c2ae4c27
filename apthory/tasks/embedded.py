"""Embedded tasks: drawn, or cut from images that ship with scikit-image and scikit-learn.

Image `number` of a part (0 train, 1 test) has the class `number` modulo the number of classes, and is drawn in
units of its side, so that a task is the same at every size. The constants were chosen such that a linear probe
on either shipped backbone, trained on 400 images, gets 40 to 90 % right.
"""

import math
from functools import cache
from importlib import resources

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from apthory.tasks.task import Images, Task, check_size

_NUM_IMAGES = 500  # in each part
_SHAPES = {  # signed distance from the outline in units of the radius, negative inside
    "disc": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85,
    "triangle": lambda x, y: np.maximum(abs(x) * 0.866 - y * 0.5, y) - 0.6,
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.33, np.maximum(abs(x), abs(y)) - 1),
    "bar": lambda x, y: np.maximum(abs(x) - 1, abs(y) - 0.25),
}
_COLOURED_SHAPES = ("disc", "triangle", "cross")  # of color_shape
_COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220)}
_ROW_NAMES, _COLUMN_NAMES = ("top", "middle", "bottom"), ("left", "centre", "right")
_PHOTOGRAPHS = {  # in scikit-image's wheel, and the box that is all texture: left half train, right half test
    "brick": ("brick.png", (0, 0, 512, 512)),
    "grass": ("grass.png", (0, 0, 512, 512)),
    "gravel": ("gravel.png", (0, 0, 512, 512)),
    "tissue": ("ihc.png", (0, 0, 512, 512)),
    "galaxies": ("hubble_deep_field.jpg", (0, 0, 1000, 872)),
    "moon": ("moon.png", (0, 0, 512, 512)),
    "retina": ("retina.jpg", (300, 200, 1100, 1200)),
    "fur": ("chelsea.png", (60, 180, 300, 300)),
    "print": ("page.png", (0, 0, 384, 170)),
}


class _Scene:
    """A canvas to paint on; at first a smooth, noisy, almost grey background."""

    def __init__(self, random: np.random.Generator, size: int, low: int = 80, high: int = 176):
        self.size = size
        self.base = random.uniform(low, high) + random.uniform(-25, 25, 3)
        self.canvas = self.base + 0.1 * _field(random, 4, size)
        self.noise = 0.1 * _field(random, 64, size)

    def contrasting(self, random: np.random.Generator) -> Float[np.ndarray, " channel"]:
        """A random colour that differs from the background by at least 68 in every channel."""
        return (self.base + random.uniform(68, 188, 3)) % 256

    def paint(self, cover: Float[np.ndarray, "height width"], colour: Float[np.ndarray, " channel"]) -> None:
        self.canvas = self.canvas * (1 - cover[..., None]) + colour * cover[..., None]

    def draw(self, shape: str, x: float, y: float, radius: float, angle: float, colour: np.ndarray) -> None:
        """Paint a shape around (x, y) with smooth edges; angle in radians, counter-clockwise."""
        axis = (np.arange(self.size) + 0.5) / self.size
        u, v = (axis[None, :] - x) / radius, (y - axis[:, None]) / radius
        cos, sin = math.cos(angle), math.sin(angle)
        distance = _SHAPES[shape](cos * u + sin * v, cos * v - sin * u) * radius * self.size
        self.paint(np.clip(0.5 - distance, 0, 1), colour)

    def pixels(self) -> UInt8[np.ndarray, "channel height width"]:
        return np.clip(np.rint(self.canvas + self.noise), 0, 255).astype(np.uint8).transpose(2, 0, 1)


def _field(random: np.random.Generator, cells: int, size: int) -> Float[np.ndarray, "height width channel"]:
    """Random colours from -127.5 to 127.5 on a square of cells, interpolated."""
    colours = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(colours.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64) - 127.5


def _digit(random: np.random.Generator, part: int, number: int, size: int) -> np.ndarray:
    """Handwritten digits of scikit-learn (first half train, second half test), bright on dark."""
    scene = _Scene(random, size, low=10, high=30)
    side = round(size * random.uniform(0.9, 1))
    left, top = (random.uniform(0, 1, 2) * (size - side)).astype(int)
    ink = Image.fromarray(_handwriting(part, number % 10)[number // 10])
    cover = np.zeros((size, size))
    cover[top : top + side, left : left + side] = ink.resize((side, side), Image.Resampling.BICUBIC)
    scene.paint(cover / 255, random.uniform(220, 250, 3))
    return scene.pixels()


@cache
def _handwriting(part: int, digit: int) -> UInt8[np.ndarray, "image height width"]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    in_part = np.arange(len(digits.target)) * 2 // len(digits.target) == part
    return np.rint(digits.images[in_part & (digits.target == digit)] * (255 / 16)).astype(np.uint8)


def _texture(random: np.random.Generator, part: int, number: int, size: int) -> np.ndarray:
    """Grey crops of 32 to 64 px of photographs, turned by right angles, of random brightness and contrast."""
    file, (left, top, right, bottom) = list(_PHOTOGRAPHS.values())[number % len(_PHOTOGRAPHS)]
    middle = (left + right) // 2
    left, right = ((left, middle), (middle, right))[part]
    side = int(random.integers(32, 65))
    x, y = int(random.integers(left, right - side + 1)), int(random.integers(top, bottom - side + 1))
    crop = _photograph(file).crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BICUBIC)
    grey = np.rot90(np.asarray(crop, dtype=np.float64), random.integers(4))
    grey = (grey - grey.mean()) * random.uniform(0.5, 1.5) + random.uniform(70, 186)
    return np.repeat(np.clip(np.rint(grey), 0, 255).astype(np.uint8)[None], 3, axis=0)


@cache
def _photograph(file: str) -> Image.Image:
    with resources.as_file(resources.files("skimage") / "data" / file) as path, Image.open(path) as image:
        return image.convert("L")


def _count(random: np.random.Generator, part: int, number: int, size: int) -> np.ndarray:
    """From 1 to 4 shapes; kind, size, angle, colour and place vary."""
    scene = _Scene(random, size)
    for cell in random.permutation(9)[: number % 4 + 1]:  # of a 3 x 3 grid: shapes do not touch
        x, y = (np.array(divmod(cell, 3)) + random.uniform(0.4, 0.6, 2)) / 3
        radius, angle = random.uniform(0.1, 0.14), random.uniform(0, math.tau)
        kind = random.choice(["disc", "square", "triangle"])
        scene.draw(kind, x, y, radius, angle, scene.contrasting(random))
    return scene.pixels()


def _position(random: np.random.Generator, part: int, number: int, size: int) -> np.ndarray:
    """The cell of a 3 x 3 grid that holds the centre of a bright shape; kind, size and angle vary."""
    scene = _Scene(random, size, low=50, high=90)
    y, x = (np.array(divmod(number % 9, 3)) + random.uniform(0, 1, 2)) / 3
    radius, angle = random.uniform(0.2, 0.45), random.uniform(0, math.tau)
    kind = random.choice(["disc", "square", "triangle", "cross"])
    scene.draw(kind, x, y, radius, angle, random.uniform(160, 240, 3))
    return scene.pixels()


def _orientation(random: np.random.Generator, part: int, number: int, size: int) -> np.ndarray:
    """The direction of a bar in steps of 30 degrees, give or take 9; length, colour and place vary."""
    scene = _Scene(random, size)
    x, y = random.uniform(0.3, 0.7, 2)
    angle = (number % 6 + random.uniform(-0.3, 0.3)) * math.pi / 6
    scene.draw("bar", x, y, random.uniform(0.3, 0.45), angle, scene.contrasting(random))
    return scene.pixels()


def _color_shape(random: np.random.Generator, part: int, number: int, size: int) -> np.ndarray:
    """The conjunction of a shape's colour and kind; shade, size, angle and place vary."""
    scene = _Scene(random, size)
    x, y = random.uniform(0.3, 0.7, 2)
    colour, kind = divmod(number % 9, 3)
    shade = list(_COLOURS.values())[colour] + random.uniform(-30, 30, 3)
    scene.draw(_COLOURED_SHAPES[kind], x, y, random.uniform(0.22, 0.3), random.uniform(0, math.tau), shade)
    return scene.pixels()


_DRAWINGS = {  # the classes, and what draws an image
    "digits": (tuple("0123456789"), _digit),
    "textures": (tuple(_PHOTOGRAPHS), _texture),
    "count": (tuple("1234"), _count),
    "position": (tuple(f"{row} {column}" for row in _ROW_NAMES for column in _COLUMN_NAMES), _position),
    "orientation": (tuple(f"{degrees} degrees" for degrees in range(0, 180, 30)), _orientation),
    "color_shape": (tuple(f"{colour} {kind}" for colour in _COLOURS for kind in _COLOURED_SHAPES), _color_shape),
}
EMBEDDED = tuple(_DRAWINGS)


def draw_task(name: str, size: int) -> Task:
    """The embedded task of this name, at a height and width of so many pixels."""
    check_size(size)
    classes, draw_one = _DRAWINGS[name]

    def images(part: int) -> Images:
        random = np.random.Generator(np.random.PCG64([part, *name.encode()]))
        pixels = np.stack([draw_one(random, part, number, size) for number in range(_NUM_IMAGES)])
        return Images(torch.from_numpy(pixels), torch.arange(_NUM_IMAGES) % len(classes))

    return Task(name, classes, images(0), images(1), f"drawn at {size} px")
