"""Errors of training; the command prints their message and nothing else.

TrainError
  RecipeError      an unknown recipe, key or value
  DataError        no usable photographs
  WeightsError     pretrained weights that are missing or do not fit
  CheckpointError  a run or checkpoint that cannot be read or continued
  DivergedError    the loss stopped being finite
  ResourceError    out of memory, or a disk that cannot be written
"""


class TrainError(Exception):
    """Base of every error that training raises on purpose."""


class RecipeError(TrainError):
    """A recipe, a key in it or its value is not known."""


class DataError(TrainError):
    """The data folder holds no usable photographs."""


class WeightsError(TrainError):
    """Pretrained weights are missing or do not fit the network."""


class CheckpointError(TrainError):
    """A run or checkpoint cannot be read, or cannot be continued as asked."""


class DivergedError(TrainError):
    """The loss was not finite for too many steps in a row."""


class ResourceError(TrainError):
    """Memory or disk ran out; the message names what to change."""
