__version__ = "0.1.0"
import sys as _sys

import lazy_loader as _lazy

from .storage import moved as _moved

_sys.meta_path.append(_moved.OldModules)
_face, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)


def __getattr__(name):
    try:
        return _face(name)
    except AttributeError:
        return _moved.look_up(name)
