import torch.utils.cpp_extension

verbosity = "none"


def get_plugin(module_name, sources, **build_kwargs):
    return torch.utils.cpp_extension.load(name=module_name, sources=sources, **build_kwargs)
