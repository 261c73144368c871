"""A CUDA device that is none: tensors that say they lie there, and are computed on the CPU.

What a machine without a GPU can find so: operands on two devices, arrays made of device tensors,
modules and generators left behind, and steps that wait for the device. Neither speed nor rounding
nor autocast are like a GPU's. The generator of the device is the CPU's, so that fits compare.
"""

import contextlib
import sys
import threading
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default)
_ACROSS = (_aten._to_copy.default, _aten.copy_.default, _aten._foreach_copy_.default, *_INDEXING)
_ASKING = (
    *(_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default),
    *(_aten.masked_select.default, _aten._unique2.default, _aten.bincount.default),
)


class DeviceTensor(torch.Tensor):
    """Tensor that says it lies on the GPU; `values` are on the CPU, the form is torch's "meta"."""

    @staticmethod
    def __new__(cls, values):
        layout = values.size(), values.stride(), values.storage_offset()
        last = sum((n - 1) * step for n, step in zip(*layout[:2], strict=True))
        room = torch.empty(layout[2] + max(last, 0) + 1, dtype=values.dtype, device="meta")
        made = torch.Tensor._make_subclass(
            cls, room.as_strided(*layout), False, device_for_backend_keys=CUDA
        )
        made.values = values
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __repr__(self, **options):
        return f"{self.values!r} on {CUDA}"

    def to(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "cuda":
            return super().to(dtype or self.dtype, **({"memory_format": form} if form else {}))
        return super().to(*args, **kwargs)

    def numpy(self, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    def tolist(self):
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


WAITS = []  # the function of the library that waited for the device, for each time


def _waits():
    frame = sys._getframe(1)
    while frame is not None and "diffaugkit" not in frame.f_globals.get("__name__", ""):
        frame = frame.f_back
    WAITS.append("?" if frame is None else frame.f_code.co_qualname)


def _run(func, args, kwargs):
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, DeviceTensor)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target).type
    if func is _aten._pin_memory.default:
        made = args[0].clone()
        made.pinned = True
        return made
    if func is _aten.is_pinned.default:
        return hasattr(args[0], "pinned")
    if not there and target not in ("cuda", "meta"):
        return func(*args, **kwargs)

    here = [t for t in tensors if not isinstance(t, DeviceTensor)]
    # CPU tensors may be numbers of an operation, or positions in a device tensor.
    joins = func in (_aten.cat.default, _aten.stack.default)
    if func not in _ACROSS and there and any(t.ndim or joins for t in here):
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    if func in _INDEXING and not isinstance(args[0], DeviceTensor):
        raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
    if kwargs.get("generator") is not None:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    masks = func in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
    crosses = func in _ACROSS and (here or target == "cpu")
    if func in _ASKING or masks or (crosses and not any(hasattr(t, "pinned") for t in here)):
        _waits()
    args, kwargs = pytree.tree_map_only(DeviceTensor, lambda t: t.values, (args, dict(kwargs)))
    if target is not None:
        kwargs["device"] = "cpu"
    known = {id(t.values): t for t in there} | {id(t): t for t in here}

    def send(made):
        return known.get(id(made), made if target == "cpu" else DeviceTensor(made))

    return pytree.tree_map_only(torch.Tensor, send, func(*args, **kwargs))


@contextlib.contextmanager
def simulated_accelerator(free=2**40):
    """Let torch see one CUDA device inside, with so many bytes free; gives the list of waits."""
    from diffaugkit import runtime

    run = threading.Thread.run

    def run_thread(thread):
        with _Mode():
            run(thread)

    faces = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (free, free),
        "empty_cache": lambda: None,
        "is_bf16_supported": lambda including_emulation=True: False,
        "_lazy_init": lambda: None,
        "_initialized": True,
        "default_generators": (torch.default_generator,),
    }
    torch._C._ensureCUDADeviceGuardSet()
    lifts, swaps = torch._C._only_lift_cpu_tensors(), torch.__future__
    before = swaps.get_swap_module_params_on_conversion()
    try:
        torch._C._set_only_lift_cpu_tensors(True)
        swaps.set_swap_module_params_on_conversion(True)
        runtime._multiplies_bf16.cache_clear()
        with (
            mock.patch.multiple(torch.cuda, **faces),
            mock.patch.object(threading.Thread, "run", run_thread),
            _Mode(),
        ):
            WAITS.clear()
            yield WAITS
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        swaps.set_swap_module_params_on_conversion(before)
        runtime._multiplies_bf16.cache_clear()
