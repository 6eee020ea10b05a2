__version__ = "0.1.0"
import lazy_loader as _lazy

from .storage import moved as _moved
from .storage.shown import document as _document

_face, _, _names = _lazy.attach_stub(__name__, __file__)
_SHORT = dict(tune="tune_schedule", check="check_schedule")  # as the commands are called
__all__ = [*_names, *_SHORT]


def __dir__():
    return __all__


def __getattr__(name):
    try:
        return _document(_face(_SHORT.get(name, name)))
    except AttributeError:
        return _moved.look_up(name)
