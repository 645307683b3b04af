"""All cases: importing this fills the registry. No third-party package is imported before a case needs it."""

from tests.zoo import constants, layers, losses, models, pictures, senses, text, unusual  # noqa: F401
from tests.zoo.cases import CASES

__all__ = ["CASES"]
