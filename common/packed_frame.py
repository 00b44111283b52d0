"""A frame as it is sent: the values at the places that its settings leave free, and what the places follow from."""

from typing import Any

from common import frame
from common.config import FrameConfig
from common.errors import UserError
from common.frame import FrameSpec
from common.parts import Tensors

SWELL = 100  # times that a frame with its zeros may be larger
NAME = "weight"  # of the one tensor of the part


def without_zeros(part: Tensors, wish: FrameConfig) -> tuple[Tensors, dict[str, Any]]:
    """The free values, and fields for the message; or the part as it is, if it is not zero elsewhere."""
    whole = part[NAME].cpu()
    classes, dim = whole.shape
    try:
        values = frame.pack(whole, frame.mask(dim, classes, wish.sparsity, wish.seed))
    except UserError:
        return part, {}
    if whole.numel() > SWELL * values.numel():
        return part, {}
    return {NAME: values}, {"places": [dim, classes, wish.seed], "sparsity": wish.sparsity}


def with_zeros(part: Tensors, places: list[Any], sparsity: float) -> Tensors:
    """The other way, of what has come from the network: ValueError if it is not right."""
    values = part.get(NAME)
    if values is None or len(part) > 1 or len(places) != 3 or any(type(number) is not int for number in places):
        raise ValueError("the frame is not its free values and three numbers")
    dim, classes, seed = places
    try:
        spec = FrameSpec(dim, classes, sparsity=sparsity, seed=seed)
        if dim * classes > SWELL * values.numel():  # before anything is allocated for them
            raise ValueError(f"the frame has {values.numel()} free values: too few")
        return {NAME: frame.unpack(values, spec)}
    except UserError as error:
        raise ValueError(str(error)) from None
