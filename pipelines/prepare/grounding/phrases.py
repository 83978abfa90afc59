"""Wordings of grounding questions. Which one a sample has is drawn by a seeded hash when it is made, so the same input
gives the same words. {0} is a label, an expression or a list of labels. All are ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

DETECT = (
    "Locate every object: {0}.",
    "Find all of these in the picture: {0}.",
    "Detect {0} and give the box of each one.",
    "Where in the image are these: {0}? Give every box.",
    "Draw a box around each of the following: {0}.",
    "Report the bounding boxes of {0}.",
    "List every instance of {0} with its box.",
)
REFER = (
    "Locate {0}.",
    "Where is {0}?",
    "Give the box of {0}.",
    "Find {0} in the picture.",
    "Which part of the image shows {0}? Give its bounding box.",
    "Draw a box around {0}.",
)
POINT = (
    "Point to {0}.",
    "Show me {0} with a point.",
    "Where is {0}? Answer with points.",
    "Mark {0} with a dot.",
    "Give a point on {0}, on each one if there are several.",
)
COUNT = (
    "How many of these are there: {0}?",
    "Count these: {0}.",
    "What is the number of these in the picture: {0}?",
    "How many can be seen of the following: {0}? Answer with a number.",
)
FORMS: Mapping[str, tuple[str, ...]] = {
    "any": ("",),
    "json": (" Answer in JSON.", " Output JSON.", " Use JSON format."),
    "xml": (" Answer in XML.", " Output XML.", " Use XML format."),
    "plain": (" Just the coordinates.", " Answer with the coordinates alone.", " Coordinates only, no label."),
}
NONE = ("There is none.", "None is present.", "There is no such thing in the picture.")


def pick(wordings: tuple[str, ...], *names: str) -> str:
    """One of the wordings, by a hash of names: source, sample, what for."""
    value = hashlib.sha256("\0".join(names).encode("utf-8", "surrogatepass")).digest()[:8]
    return wordings[int.from_bytes(value, "little") % len(wordings)]
