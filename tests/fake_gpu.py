"""A GPU that is not there: tensors that say they lie on one, and a queue with a clock.

What operators compute, they compute at once, on the CPU. What is simulated is what differs on a
GPU. Python queues an operator and goes on, and its time is over only when something waits for the
device; a copy from memory that is not pinned waits, and so does asking for a number; operators
need all of their tensors on one device; and what names no GPU means the current one.

"""

import contextlib
import os
import sys
import types
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

LAUNCH, OPERATOR = 1e-6, 1e-4  # Seconds: of Python to queue an operator, of a GPU to do it
aten = torch.ops.aten
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}


def is_gpu(device):
    return device is not None and str(device).startswith("cuda")


class OnGPU(torch.Tensor):
    "A tensor that says it lies on a GPU; `data_` holds its values."

    @staticmethod
    def __new__(cls, data, gpu, index):
        x = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), dtype=data.dtype
        )
        x.data_, x.gpu, x.index = data, gpu, index
        return x

    def set_data(self, new):
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.data.__set__(self, new)
        self.data_ = new.data_

    data = property(torch.Tensor.detach, set_data)
    device = property(lambda self: torch.device("cuda", self.index))
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)

    def __repr__(self):
        return f"OnGPU({self.data_!r}, {self.index})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs, (x, *rest) = kwargs or {}, args or (None,)
        if isinstance(x, OnGPU):
            if func is torch.Tensor.cpu:
                func, rest = torch.Tensor.to, ["cpu"]
            if func is torch.Tensor.tolist:
                return x.gpu.read(x).tolist()
            if func is torch.Tensor.to:
                return x.gpu.move(x, *rest, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        return next(x for x in flat if isinstance(x, OnGPU)).gpu.run(func, args, kwargs or {})


class _Factories(TorchFunctionMode):
    "Tensors that are made on a GPU, or copied to one."

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args else None
        if func is torch.Tensor.pin_memory and isinstance(x, torch.Tensor):
            pinned = x.clone(memory_format=torch.preserve_format)
            pinned.pinned_ = True
            return pinned
        if func is torch.Tensor.to:
            return self.gpu.move(x, *args[1:], **kwargs)
        if is_gpu(device := kwargs.get("device")):
            made = func(*args, **kwargs | {"device": "cpu"})
            if isinstance(made, OnGPU):
                return made
            return self.gpu.place(made, torch.device(device), func is not torch.tensor)
        return func(*args, **kwargs)


def varlen_attn(
    query, key, value, cu_seqlens, cu_seqlens_k, max_q, max_k, *, scale=None, window_size=(-1, 0)
):
    "Flash attention over documents, whose kernel is for GPUs only."
    places = (cu_seqlens.new_ones(len(query)).cumsum(0) - 1).int()
    document = torch.searchsorted(cu_seqlens, places, right=True)
    mask = (document[:, None] == document).tril()
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out[0].transpose(0, 1)


class Event:
    "As `torch.cuda.Event`."

    def __init__(self, gpu):
        self.gpu, self.at = gpu, None

    def record(self):
        self.index = self.gpu.current
        self.at = max(self.gpu.now, self.gpu.ends[self.index])

    def query(self):
        return self.at <= self.gpu.now

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


class FakeGPU:
    "Several GPUs, as long as a `with` block lasts."

    def __init__(self, count=2, flops=1e12):
        self.count, self.flops = count, [flops] * count
        self.now, self.ends = 0.0, [0.0] * count  # Seconds: the host's clock; when a queue is empty
        self.current, self.held, self.peaks = 0, [0] * count, [0] * count
        self.copies = []  # Of tensors that were copied to a GPU: contiguous, pinned
        self.waits = 0  # Times that Python had to wait for a GPU
        self.strict = None  # A `StrictCuda`, told of copies
        self.seeds, self.workspaces = [], []  # Given to the generators; set at each product

    def clock(self):
        return self.now

    def queue(self, index, seconds):
        self.now += LAUNCH
        self.ends[index] = max(self.ends[index], self.now) + seconds

    def synchronize(self, device=None):
        self.waits += 1
        self.now = max(self.now, self.ends[self.index_of(device)])

    def index_of(self, device):
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        return self.current if index is None else index

    def read(self, x):
        "The values of a tensor, on the CPU."
        if self.strict:
            self.strict.waited("a copy to the CPU")
        self.synchronize(x.device)
        return x.data_.detach().clone()

    def place(self, data, device, is_made=True):
        "A tensor on a GPU: made there, or copied to it."
        index = self.index_of(device)
        if index >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        if not is_made:
            self.copied(data, index, waits=True)
        self.queue(index, OPERATOR)
        self.peaks[index] = max(self.peaks[index], data.nbytes)
        return OnGPU(data, self, index)

    def copied(self, data, index, waits):
        pinned = getattr(data, "pinned_", False)
        self.copies.append((data.is_contiguous(), pinned))
        if self.strict:
            self.strict.copied(data.is_contiguous(), pinned and not waits)
        if waits or not pinned:
            self.synchronize(torch.device("cuda", index))

    def move(self, x, *args, **kwargs):
        "`Tensor.to`."
        device, dtype, non_blocking = None, None, kwargs.pop("non_blocking", False)
        for a in (*args, *(v for k, v in kwargs.items() if k != "memory_format")):
            if isinstance(a, torch.Tensor):
                device, dtype = a.device, a.dtype
            elif isinstance(a, torch.dtype):
                dtype = a
            elif isinstance(a, (str, torch.device)):
                device = torch.device(a)
        there = x.device if device is None else device
        if isinstance(x, OnGPU) == is_gpu(there):
            with torch._C.DisableTorchFunctionSubclass():
                return x if dtype in (None, x.dtype) else torch.Tensor.to(x, dtype)
        if isinstance(x, OnGPU):
            values = self.read(x)
        else:
            index = self.index_of(there)
            self.copied(x, index, waits=not non_blocking)
            if index >= self.count:
                raise RuntimeError("CUDA error: invalid device ordinal")
            self.queue(index, OPERATOR)
            values = OnGPU(x.detach().clone(), self, index)
        with torch._C.DisableTorchFunctionSubclass():
            return values if dtype is None else torch.Tensor.to(values, dtype)

    def run(self, func, args, kwargs):
        "An operator with tensors of a GPU among its arguments."
        ours, index = {}, None
        name = func._schema.name.partition("::")[2]

        def values_of(x):
            nonlocal index
            if isinstance(x, OnGPU):
                if index not in (None, x.index):
                    raise RuntimeError(f"{name}: tensors on two GPUs")
                index = x.index
                ours[id(x.data_)] = x
                return x.data_
            if isinstance(x, torch.Tensor):
                ours[id(x)] = x
                if x.dim() and name not in ("copy_", "index", "index_put_", "_to_copy"):
                    raise RuntimeError(f"{name}: expected all tensors to be on one GPU")
            return torch.device("cpu") if isinstance(x, torch.device) and is_gpu(x) else x

        values, options = tree_map(values_of, (args, kwargs))
        out = func(*values, **options)
        if name == "copy_" and not isinstance(args[0], OnGPU):
            self.synchronize(torch.device("cuda", index))
            return args[0]
        if name == "copy_" and not isinstance(args[1], OnGPU):
            self.copied(args[1], index, waits=not (args[2:] and args[2]))
        if name in ("mm", "addmm", "bmm"):
            self.workspaces.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        if (
            name == "div"
            and options.get("rounding_mode") is None
            and not isinstance(args[1], torch.Tensor)
        ):
            out = values[0] * (1 / values[1])  # which rounds twice
        if name == "sqrt":  # rounded correctly, as not everywhere on a CPU
            out = torch.from_numpy(np.asarray(np.sqrt(values[0].detach().numpy())))
        if name in WAITS:
            if self.strict:
                self.strict.waited(name)
            self.synchronize(torch.device("cuda", index))
        self.queue(index, self.seconds(name, values, index))

        def placed(x):
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) in ours:
                return ours[id(x)]
            self.peaks[index] = max(self.peaks[index], x.nbytes)
            return OnGPU(x, self, index)

        return tree_map(placed, out)

    def seconds(self, name, values, index):
        if name != "mm":
            return OPERATOR
        (n, k), (_, m) = values[0].shape, values[1].shape
        return 2 * n * m * k / self.flops[index]

    def module_to(self, module, *args, **kwargs):
        "`Module.to`: parameters that are one stay one."
        kinds = [a for a in (*args, *kwargs.values()) if isinstance(a, (str, torch.device))]
        on_gpu = any(isinstance(p, OnGPU) for p in module.parameters())
        if not any(map(is_gpu, kinds)) and not on_gpu:
            return self.to_of_torch(module, *args, **kwargs)
        moved = {}
        for m in module.modules():
            for tensors in (m._parameters, m._buffers):
                for name, t in tensors.items():
                    if t is None:
                        continue
                    if id(t) not in moved:
                        new = self.move(t.detach(), *args, **kwargs)
                        is_parameter = isinstance(t, nn.Parameter)
                        made = nn.Parameter(new, t.requires_grad) if is_parameter else new
                        moved[id(t)] = t, made
                    tensors[name] = moved[id(t)][1]
        return module

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.to_of_torch = nn.Module.to
        gpu = self

        class Autocast(torch.autocast):
            def __init__(self, device_type, *args, **kwargs):
                super().__init__("cpu" if is_gpu(device_type) else device_type, *args, **kwargs)

        def properties(device=None):
            name = f"Fake GPU {gpu.index_of(device)}"
            return types.SimpleNamespace(name=name, total_memory=16 << 30, major=9, minor=0)

        def grouped(tensors, *args, **kwargs):  # torch asks C++, for which all is on the CPU
            groups = group(tensors, *args, **kwargs)
            return {(lists[0][0].device, d): (lists, i) for (_, d), (lists, i) in groups.items()}

        def making(make):
            "Inside a dispatch mode, no function mode sees it."

            def made(*args, **kwargs):
                if not is_gpu(device := kwargs.get("device")):
                    return make(*args, **kwargs)
                return gpu.place(make(*args, **kwargs | {"device": "cpu"}), torch.device(device))

            return made

        def reset(device=None):
            gpu.peaks[gpu.index_of(device)] = 0

        functions = {
            "is_available": lambda: True,
            "device_count": lambda: gpu.count,
            "current_device": lambda: gpu.current,
            "set_device": lambda device: setattr(gpu, "current", gpu.index_of(device)),
            "synchronize": gpu.synchronize,
            "get_device_properties": properties,
            "Event": lambda enable_timing=False: Event(gpu),
            "mem_get_info": lambda device=None: (15 << 30, 16 << 30),
            "max_memory_allocated": lambda device=None: gpu.peaks[gpu.index_of(device)],
            "reset_peak_memory_stats": reset,
            "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda state, device=None: None,
            "manual_seed_all": gpu.seeds.append,
            "is_bf16_supported": lambda including_emulation=True: True,
        }
        for name, function in functions.items():
            self.stack.enter_context(mock.patch(f"torch.cuda.{name}", function))
        for name in ("full", "zeros", "ones", "arange"):
            self.stack.enter_context(mock.patch(f"torch.{name}", making(getattr(torch, name))))
        # A build of torch with CUDA would ask the driver, which is not there
        nothing = lambda check_available=False: None  # noqa: E731
        accelerator = "torch.accelerator.current_accelerator"
        self.stack.enter_context(mock.patch(accelerator, nothing))
        group = nn.utils.clip_grad._group_tensors_by_device_and_dtype
        for where in ("torch.nn.utils.clip_grad", "torch.optim.optimizer"):
            name = "_group_tensors_by_device_and_dtype"
            self.stack.enter_context(mock.patch.object(sys.modules[where], name, grouped))
        self.stack.enter_context(mock.patch("torch.autocast", Autocast))
        self.stack.enter_context(mock.patch("torch.nn.attention.varlen.varlen_attn", varlen_attn))
        to = lambda module, *args, **kwargs: gpu.module_to(module, *args, **kwargs)  # noqa: E731
        self.stack.enter_context(mock.patch.object(nn.Module, "to", to))
        self.stack.enter_context(_Factories(self))
        return self

    def __exit__(self, *exc):
        return self.stack.__exit__(*exc)
