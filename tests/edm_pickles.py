"""Writes pickles as NVIDIA's EDM code does: objects that carry their class's source and a dict of state."""
import pickle
import sys
import types

import torch


class Persistent:
    """Pickles as a call of torch_utils.persistence._reconstruct_persistent_obj, which only `dump` defines."""

    def __init__(self, class_name, state):
        self.meta = {"type": "class", "version": 6, "class_name": class_name, "state": state,
                     "module_src": "raise RuntimeError('source in a checkpoint was run')\n"}

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def as_persistent(module, class_name="Module", **state):
    """A torch module as NVIDIA's persistent object of that class."""
    children = {name: as_persistent(child) for name, child in module._modules.items()}
    return Persistent(class_name, {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers),
                                   "_modules": children, **state})


def edm_file(encoder, network_arguments, model_class="SongUNet", precond_class="EDMPrecond"):
    """The content of NVIDIA's file for an EDMEncoder: dict(ema=EDMPrecond object)."""
    network = as_persistent(encoder.model, model_class, _init_args=(), _init_kwargs=network_arguments)
    state = {"_parameters": {}, "_buffers": {}, "_modules": {"model": network}, "sigma_data": 0.5,
             "_init_args": (), "_init_kwargs": {}}
    return {"ema": Persistent(precond_class, state)}


def dump(content, path):
    """Pickle `content` to `path`; the names of NVIDIA's modules exist for the time of writing only."""
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("only its name is ever used")
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules.update({"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": module})
    try:
        with open(path, "wb") as file:
            pickle.dump(content, file)
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]


def randomise(module, seed=0):
    """Fill every parameter with numbers of a sensible size, so that no layer is a silent zero."""
    random = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) / max(1, parameter[0].numel()) ** 0.5
    return module
