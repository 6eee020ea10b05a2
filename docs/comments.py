"""Extension of griffe: in the reference the face says what `help` says.

Parameters are explained in comments beside them, which a static reader does not see;
`seats_analysis` puts them into the docstrings of its face.
"""

import re

import griffe

import seats_analysis as sa


class Comments(griffe.Extension):
    "Docstrings as they are at run time."

    def __init__(self):
        offered = [getattr(sa, name) for name in sa.__all__]
        named = [thing for thing in offered if hasattr(thing, "__qualname__")]
        self.said = {f"{t.__module__}.{t.__qualname__}": t.__doc__ for t in named}

    def on_object(self, *, obj, **_):
        if text := self.said.get(obj.path):
            text = re.sub(r"(?m)^(\**\w+ : .*?) = .*$", r"\1", text)  # defaults have a column
            obj.docstring = griffe.Docstring(text, parser="numpy", parent=obj)
