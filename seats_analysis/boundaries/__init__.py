from ..storage.moved import look_up as __getattr__  # noqa: F401  once a module
