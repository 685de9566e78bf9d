"""What a GPU refuses while algorithms are to be deterministic, and what makes it wait.

The first are the operators that torch's documentation says to raise on CUDA. Which tensors lie on a
GPU is said by `fake_gpu`.
"""

from fake_gpu import OnGPU
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# As the documentation of `torch.use_deterministic_algorithms` names them -> operators
RAISING = {
    "torch.nn.AvgPool3d": ["avg_pool3d_backward"],
    "torch.nn.AdaptiveAvgPool2d": ["_adaptive_avg_pool2d_backward"],
    "torch.nn.AdaptiveAvgPool3d": ["_adaptive_avg_pool3d_backward"],
    "torch.nn.AdaptiveMaxPool2d": ["adaptive_max_pool2d_backward"],
    "torch.nn.FractionalMaxPool2d": ["fractional_max_pool2d_backward"],
    "torch.nn.FractionalMaxPool3d": ["fractional_max_pool3d_backward"],
    "torch.nn.MaxUnpool1d": ["max_unpool2d"],
    "torch.nn.MaxUnpool2d": ["max_unpool2d"],
    "torch.nn.MaxUnpool3d": ["max_unpool3d"],
    "torch.nn.functional.interpolate": [
        "upsample_linear1d_backward",
        "upsample_bilinear2d_backward",
        "upsample_bicubic2d_backward",
        "upsample_trilinear3d_backward",
    ],
    "torch.nn.ReflectionPad1d": ["reflection_pad1d_backward"],
    "torch.nn.ReflectionPad2d": ["reflection_pad2d_backward"],
    "torch.nn.ReflectionPad3d": ["reflection_pad3d_backward"],
    "torch.nn.NLLLoss": ["nll_loss2d_forward"],  # of images: each pixel adds to one number
    "torch.nn.CTCLoss": ["_ctc_loss_backward"],
    "torch.nn.EmbeddingBag": ["_embedding_bag_backward", "_embedding_bag_dense_backward"],
    "torch.Tensor.put_": ["put", "put_"],
    "torch.histc": ["histc"],
    "torch.bincount": ["bincount"],
    "torch.median": ["median", "nanmedian"],
    "torch.nn.functional.grid_sample": ["grid_sampler_2d_backward", "grid_sampler_3d_backward"],
    "torch.cumsum": ["cumsum", "cumsum_"],
    "torch.Tensor.scatter_reduce": ["scatter_reduce", "scatter_reduce_"],
    "torch.Tensor.resize_": [],  # of quantized tensors, which there are none of
}
NAMES = {name for names in RAISING.values() for name in names}


def raises_on_cuda(func, args, kwargs):
    "Whether an operator has no deterministic form on a GPU."
    name, overload = func._schema.name.partition("::")[2], func._schema.overload_name
    if name not in NAMES or not any(isinstance(x, OnGPU) for x in tree_leaves((args, kwargs))):
        return False
    if name.startswith("cumsum"):
        dtype = kwargs.get("dtype") or args[0].dtype
        return dtype.is_floating_point or dtype.is_complex
    if name == "bincount":
        return (args[1] if len(args) > 1 else kwargs.get("weights")) is not None
    if name in ("median", "nanmedian"):
        return overload.startswith("dim")  # with indices
    if name.startswith("scatter_reduce"):
        return "prod" in args or kwargs.get("reduce") == "prod"
    return True


class Refused(RuntimeError):
    "A GPU would refuse this, or wait where it must not."


class StrictCuda(TorchDispatchMode):
    "Raises `Refused`. Inside `step` it also refuses to wait for the device."

    def __init__(self):
        super().__init__()
        self.steps = self.operators = 0  # Seen so far
        self.in_step = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operators += 1
        if raises_on_cuda(func, args, kwargs):
            raise Refused(f"{func} has no deterministic form on a GPU")
        return func(*args, **kwargs)

    def waited(self, what):
        if self.in_step:
            raise Refused(f"{what} inside a training step waits for the device")

    def copied(self, contiguous, beside):
        if not contiguous:
            raise Refused("a copy to the device from memory that is not contiguous")
        if self.in_step and not beside:
            raise Refused("a copy to the device inside a training step waits for it")

    def step(self, train_step):
        "A `train_step` that must not wait."

        def wrapped(*args, **kwargs):
            self.steps, self.in_step = self.steps + 1, True
            try:
                return train_step(*args, **kwargs)
            finally:
                self.in_step = False

        return wrapped
