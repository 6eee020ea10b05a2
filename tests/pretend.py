"""A GPU that is not there: tensors that say they lie on `cuda:0` and are computed on the CPU, under
the rules of a GPU.

Within `pretend_gpu()` tensors of both devices cannot be mixed, and every wait of the host for the
device is noted (and raises inside `no_waits()`). What a GPU computes, how fast, and
whether kernels run there, it cannot say."""

import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda:0")
aten = torch.ops.aten
ASKS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.equal,
    aten.is_nonzero,
    aten.bincount,
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
LACKING = {
    aten.histc.default: lambda x, *args: aten.histc(x.float(), *args).to(x.dtype)
}  # what the CPU has for other types only


class Wait(RuntimeError):
    "The host waits for the device."


@dataclass(frozen=True)
class Asked:
    "A wait: the operation, file and line, and whether that is ours."

    why: str
    where: str
    ours: bool


class Gpu:
    "What the device and the host did."

    def __init__(self):
        self.waits, self.strict = [], False

    def wait(self, why):
        self.waits.append(Asked(why, *_caller()))
        if self.strict:
            raise Wait(f"{why}, in {self.waits[-1].where}")

    def event(self, enable_timing=False):
        return Event(self)


def _caller():
    "File and line outside of torch and of this module from which an operation was asked for."
    frame = sys._getframe(2)
    while frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.name}:{frame.f_lineno}", path.parents[1].name == "seats_analysis"


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self, stream=None):
        self.at = time.perf_counter()

    def query(self):
        return True

    def synchronize(self):
        self.gpu.wait("event")

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class OnGpu(torch.Tensor):
    "A tensor on the device; `held` has its values."

    @staticmethod
    def __new__(cls, held, gpu):
        new = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=CUDA,
        )
        new.held, new.gpu = held, gpu
        return new

    def __repr__(self, **kwargs):
        return f"OnGpu({self.held!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of `pretend_gpu`")


def _each(x):
    "What lies in nested arguments. (torch's own trees take ten times as long.)"
    if isinstance(x, (list, tuple)):
        for y in x:
            yield from _each(y)
    elif isinstance(x, dict):
        yield from _each(tuple(x.values()))
    else:
        yield x


def _mapped(x, kind, change):
    "Nested arguments with everything of one kind changed."
    if isinstance(x, kind):
        return change(x)
    if isinstance(x, (list, tuple)):
        return type(x)([_mapped(y, kind, change) for y in x])
    return {k: _mapped(y, kind, change) for k, y in x.items()} if isinstance(x, dict) else x


def _held(*args):
    return _mapped(args, OnGpu, lambda x: x.held)


def _run(gpu, func, args, kwargs):
    "One operation, by the rules."
    if func is aten._to_copy.default:
        return _move(gpu, *args, **kwargs)
    if func is aten.copy_.default:
        return _copy(gpu, *args, **kwargs)
    _check(gpu, func, args, kwargs)
    held, options = _held(args, {k: v for k, v in kwargs.items() if k != "device"})
    out = LACKING.get(func, func)(*held, **options)
    if func is aten._local_scalar_dense.default or not _cuda(kwargs.get("device") or CUDA):
        return out
    written = [
        a
        for a, spec in zip(args, func._schema.arguments)
        if spec.alias_info is not None and spec.alias_info.is_write and isinstance(a, OnGpu)
    ]
    written += [
        kwargs[spec.name]
        for spec in func._schema.arguments
        if spec.kwarg_only
        and spec.name in kwargs
        and spec.alias_info is not None
        and spec.alias_info.is_write
    ]
    same = {id(w.held): w for w in written}
    return _mapped(out, torch.Tensor, lambda x: same[id(x)] if id(x) in same else OnGpu(x, gpu))


def _check(gpu, func, args, kwargs):
    "Raise for tensors of two devices; note a wait."
    index = (
        [x for x in args[1] if x is not None] if func in INDEXING else []
    )  # an index may lie on the host; it is copied then
    for x in (x for x in _each((args, kwargs)) if isinstance(x, torch.Tensor)):
        if not isinstance(x, OnGpu) and x.dim() and not any(x is i for i in index):
            raise RuntimeError(
                f"{func}: Expected all tensors to be on the same device, but found "
                f"{tuple(x.shape)} on {x.device}"
            )
    if getattr(func, "overloadpacket", None) in ASKS or any(
        x.dtype in (torch.bool, torch.uint8) or not isinstance(x, OnGpu) for x in index
    ):
        gpu.wait(str(func))
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        gpu.wait(str(func))


def _move(gpu, x, device=None, non_blocking=False, pin_memory=None, **how):
    "To another device, or to another type on the same."
    here = isinstance(x, OnGpu)
    there = here if device is None else _cuda(device)
    if here and not there:
        gpu.wait("copy to the host")
    if there and not here and x.dim() and x.numel() and not non_blocking:
        gpu.wait("copy from the host, waited for")
    held = aten._to_copy.default(x.held if here else x, **how)
    return OnGpu(held, gpu) if there else held


def _copy(gpu, to, source, non_blocking=False):
    here, there = isinstance(source, OnGpu), isinstance(to, OnGpu)
    if here and not there:
        gpu.wait("copy to the host")
    if there and not here and source.dim() and not non_blocking:
        gpu.wait("copy from the host, waited for")
    (to.held if there else to).copy_(source.held if here else source)
    return to


class _Mode:
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu


class Operations(_Mode, TorchDispatchMode):
    "Every operation, also those that make a tensor on the device from none."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(x, OnGpu) for x in _each((args, kwargs))):
            return _run(self.gpu, func, args, kwargs)
        if not _cuda(kwargs.get("device")):
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            return _move(self.gpu, *args, **kwargs)
        return OnGpu(func(*args, **{**kwargs, "device": "cpu"}), self.gpu)


class Calls(_Mode, TorchFunctionMode):
    "What must be seen before torch looks for a driver."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        if func is torch.Tensor.tolist and isinstance(args[0], OnGpu):
            return args[0].cpu().tolist()  # torch refuses it for every subclass
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = args[0], torch.tensor(args[1])
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.tensor and _cuda(kwargs.get("device")):
            return func(
                *_mapped(args, OnGpu, lambda x: x.item()), **{**kwargs, "device": "cpu"}
            ).to(CUDA)
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], OnGpu):
            return self.attention(func, args, kwargs)
        return func(*args, **kwargs)

    def attention(self, func, args, kwargs):
        "In one piece, as the choice of a kernel asks the driver."
        _check(self.gpu, func, args, kwargs)
        args, kwargs = _held(args, kwargs)
        return OnGpu(func(*args, **kwargs), self.gpu)


def _cuda(device):
    return device is not None and torch.device(device).type == "cuda"


class HostGenerator(torch.Generator):
    "Random numbers of the device, drawn on the host."

    def __new__(cls, device=None):
        return super().__new__(cls)


@contextmanager
def pretend_gpu():
    "Yields a `Gpu`; within the block tensors can be moved to 'cuda'."
    torch._C._ensureCUDADeviceGuardSet()  # without a driver: guards that do nothing
    gpu = Gpu()
    patches = dict(
        Event=gpu.event,
        current_stream=lambda device=None: None,
        synchronize=lambda device=None: gpu.wait("synchronize"),
        get_device_name=lambda device=None: "pretended",
        get_device_capability=lambda device=None: (8, 0),
        reset_peak_memory_stats=lambda device=None: None,
        max_memory_allocated=lambda device=None: 0,
        _lazy_init=lambda: None,
    )
    with ExitStack() as stack:
        for name, new in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, new))
        stack.enter_context(mock.patch.object(torch, "Generator", HostGenerator))
        stack.enter_context(
            mock.patch.dict("os.environ", SEATS_TRITON="0")
        )  # kernels have their own tests
        stack.callback(
            torch.__future__.set_overwrite_module_params_on_conversion,
            torch.__future__.get_overwrite_module_params_on_conversion(),
        )
        torch.__future__.set_overwrite_module_params_on_conversion(
            True
        )  # so that `model.cuda()` works
        for mode in (Operations(gpu), Calls(gpu)):
            stack.enter_context(mode)
        yield gpu


@contextmanager
def no_waits(gpu):
    before, gpu.strict = gpu.strict, True
    try:
        yield
    finally:
        gpu.strict = before
