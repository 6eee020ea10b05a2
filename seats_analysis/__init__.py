__version__ = "0.1.0"
import lazy_loader as _lazy

from .storage import moved as _moved

_face, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)


def __getattr__(name):
    try:
        return _face(name)
    except AttributeError:
        return _moved.look_up(name)
