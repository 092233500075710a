"""States as cartridges: a text read once, kept, changed, and asked about as often as one likes.

A state is the model's whole context compressed to a fixed size (Gu & Dao 2023, arXiv:2312.00752, section 3.1). So it
can be saved, mixed with others, and put under a question that was never in one piece with the text.
"""

from ssminterp.cartridges.algebra import StateDifference, average, blank, difference, distance, interpolate
from ssminterp.cartridges.library import CartridgeLibrary
from ssminterp.cartridges.recall import accuracy_by_layers, answer_by_layers, answers

__all__ = [
    "CartridgeLibrary",
    "StateDifference",
    "accuracy_by_layers",
    "answer_by_layers",
    "answers",
    "average",
    "blank",
    "difference",
    "distance",
    "interpolate",
]
