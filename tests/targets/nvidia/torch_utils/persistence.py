"""Classes whose instances bring their source in a pickle; from there it runs in a module of its own."""

import copy
import inspect
import sys
import types
import uuid

_module_to_src_dict = {}
_src_to_module_dict = {}


def persistent_class(cls):
    source = _module_to_src_dict.get(cls.__module__)
    if source is None:
        module = sys.modules[cls.__module__]
        source = _module_to_src_dict[cls.__module__] = inspect.getsource(module)
        _src_to_module_dict[source] = module

    class Decorator(cls):
        _source = source

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = copy.deepcopy(args), copy.deepcopy(kwargs)

        def __reduce__(self):
            meta = {"module_src": self._source, "class_name": type(self).__name__, "state": self.__dict__}
            return _reconstruct_persistent_obj, (meta,)

    Decorator.__name__ = cls.__name__
    return Decorator


def _reconstruct_persistent_obj(meta):
    source = meta["module_src"]
    if source not in _src_to_module_dict:
        name = "_imported_module_" + uuid.uuid4().hex
        module = types.ModuleType(name)
        sys.modules[name] = module
        _module_to_src_dict[name] = source
        _src_to_module_dict[source] = module
        exec(source, module.__dict__)
    kind = getattr(_src_to_module_dict[source], meta["class_name"])
    made = kind.__new__(kind)
    made.__dict__.update(meta["state"])
    return made
