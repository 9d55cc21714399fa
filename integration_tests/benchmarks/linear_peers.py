# SPDX-License-Identifier: Apache-2.0
"""Linear layers of other low-bit libraries on the CPU, for bench_linear_cpu.py; what is not installed is left out."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch


Call = Callable[[torch.Tensor], torch.Tensor]


def _torch_dynamic(layer: torch.nn.Linear, engine: str) -> Call:
    from torch.ao.quantization import quantize_dynamic

    torch.backends.quantized.engine = engine
    return quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8)


def _onnxruntime(layer: torch.nn.Linear) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = layer.weight.detach()
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8).T.contiguous()
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "q_scale", "q_zero"]),
        helper.make_node("MatMulInteger", ["q", "codes", "q_zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["q_scale", "scale"], ["both"]),
        helper.make_node("Mul", ["floats", "both"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, layer.in_features])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None, layer.out_features])],
        [numpy_helper.from_array(codes.numpy(), "codes"), numpy_helper.from_array(scale.numpy(), "scale")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _openvino(layer: torch.nn.Linear) -> Call:
    """int8 weights and, as OpenVINO does on its own, activations rounded in groups."""
    import numpy
    import openvino
    from openvino import opset13

    weight = layer.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    x = opset13.parameter([-1, layer.in_features], numpy.float32)
    codes = opset13.convert(opset13.constant((weight / scale).round().to(torch.int8).numpy()), numpy.float32)
    product = opset13.matmul(x, opset13.multiply(codes, opset13.constant(scale.numpy())), False, True)
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}
    request = openvino.compile_model(openvino.Model([product], [x]), "CPU", options).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])


def _torchao(layer: torch.nn.Linear, kind: str) -> Call:
    from torchao import quantization

    model = torch.nn.Sequential(layer)
    quantization.quantize_(model, getattr(quantization, kind)())
    return model


def _quanto(layer: torch.nn.Linear) -> Call:
    from optimum.quanto import freeze, qint8, quantize

    model = torch.nn.Sequential(layer)
    quantize(model, weights=qint8)
    freeze(model)
    return model


def _sdnq(layer: torch.nn.Linear) -> Call:
    from sdnq import SDNQConfig
    from sdnq.quantizer import sdnq_quantize_layer

    layer.weight.requires_grad_(False)
    return sdnq_quantize_layer(layer, SDNQConfig(weights_dtype="int8", use_quantized_matmul=True))[0]


def _bitsandbytes(layer: torch.nn.Linear) -> Call:
    import bitsandbytes

    quantized = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    quantized.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    return quantized.to("cpu")


GGML_TYPES = {"Q4_0": 2, "TQ2_0": 35}


class _InitParams(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """ggml by its C interface, from a folder of its shared libraries (such as the npm package
    `@node-llama-cpp/linux-x64` has).

    Args:
        folder (`Path`): with `libggml-base.so` and `libggml-cpu-<processor>.so`.
        processor (`str`): haswell (AVX2), icelake (AVX-512-VNNI), sapphirerapids (AMX), ...
    """

    def __init__(self, folder: Path, processor: str) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(folder / f"libggml-cpu-{processor}.so"))
        cpu.ggml_backend_init.restype = ctypes.c_void_p
        registry = ctypes.c_void_p(cpu.ggml_backend_init())
        self.device = self.pointer("ggml_backend_reg_dev_get", registry, ctypes.c_size_t(0))
        self.backend = self.pointer("ggml_backend_dev_init", self.device, None)
        find = self.base.ggml_backend_reg_get_proc_address
        find.restype = ctypes.c_void_p
        set_threads = find(registry, b"ggml_backend_set_n_threads")
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(set_threads)(self.backend, 1)
        extra = find(registry, b"ggml_backend_dev_get_extra_bufts")
        found = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(extra)(self.device)
        self.layouts = []  # repacked weights, the best first
        while found and found[len(self.layouts)]:
            self.layouts.append(ctypes.c_void_p(found[len(self.layouts)]))
        self.plain = self.pointer("ggml_backend_dev_buffer_type", self.device)

    def pointer(self, name: str, *arguments: object) -> ctypes.c_void_p:
        """The result of a function that returns a pointer."""
        function = getattr(self.base, name)
        function.restype = ctypes.c_void_p
        return ctypes.c_void_p(function(*arguments))

    def context(self) -> ctypes.c_void_p:
        """Room for the descriptions of tensors."""
        return self.pointer("ggml_init", _InitParams(1 << 20, None, True))

    def linear(self, layer: torch.nn.Linear, kind: str) -> Call:
        """The layer with weights of a type."""
        rows, columns = layer.weight.shape
        weight = layer.weight.detach().contiguous()
        context = self.context()
        tensor = self.pointer(
            "ggml_new_tensor_2d", context, GGML_TYPES[kind], ctypes.c_int64(columns), ctypes.c_int64(rows)
        )
        size = self.base.ggml_nbytes
        size.restype = ctypes.c_size_t
        packed = ctypes.create_string_buffer(size(tensor))
        quantize = self.base.ggml_quantize_chunk
        quantize.restype = ctypes.c_size_t
        numbers = (ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(columns))
        quantize(GGML_TYPES[kind], ctypes.c_void_p(weight.data_ptr()), packed, *numbers, None)
        layout = self.layouts[0] if kind == "Q4_0" and self.layouts else self.plain
        assert self.pointer("ggml_backend_alloc_ctx_tensors_from_buft", context, layout).value
        self.base.ggml_backend_tensor_set(tensor, packed, ctypes.c_size_t(0), ctypes.c_size_t(len(packed)))
        graphs = {}

        def prepare(tokens: int) -> tuple[ctypes.c_void_p, ...]:
            context = self.context()
            x = self.pointer("ggml_new_tensor_2d", context, 0, ctypes.c_int64(columns), ctypes.c_int64(tokens))
            out = self.pointer("ggml_mul_mat", context, tensor, x)
            graph = self.pointer("ggml_new_graph", context)
            self.base.ggml_build_forward_expand(graph, out)
            assert self.pointer("ggml_backend_alloc_ctx_tensors_from_buft", context, self.plain).value
            return x, out, graph

        def call(x: torch.Tensor) -> torch.Tensor:
            if len(x) not in graphs:
                graphs[len(x)] = prepare(len(x))
            source, target, graph = graphs[len(x)]
            out = torch.empty(len(x), rows)
            sizes = [(ctypes.c_size_t(0), ctypes.c_size_t(part.numel() * 4)) for part in (x, out)]
            self.base.ggml_backend_tensor_set(source, ctypes.c_void_p(x.data_ptr()), *sizes[0])
            assert self.base.ggml_backend_graph_compute(self.backend, graph) == 0
            self.base.ggml_backend_tensor_get(target, ctypes.c_void_p(out.data_ptr()), *sizes[1])
            return out

        return call


def peers(
    columns: int, in_features: int, ggml: Ggml | None, skip: list[str]
) -> dict[str, tuple[Call, torch.Tensor, float]]:
    """Calls, the dense weights they stand for, and the error that their bits excuse; failures are reported."""
    builders: dict[str, tuple[Callable[[torch.nn.Linear], Call], float]] = {
        "torch dynamic int8, oneDNN": (lambda layer: _torch_dynamic(layer, "onednn"), 0.05),
        "torch dynamic int8, FBGEMM": (lambda layer: _torch_dynamic(layer, "fbgemm"), 0.05),
        "ONNX Runtime int8": (_onnxruntime, 0.05),
        "OpenVINO int8": (_openvino, 0.05),
        "torchao int8 weight-only": (lambda layer: _torchao(layer, "Int8WeightOnlyConfig"), 0.05),
        "torchao int8": (lambda layer: _torchao(layer, "Int8DynamicActivationInt8WeightConfig"), 0.05),
        "quanto int8 weight-only": (_quanto, 0.05),
        "SDNQ int8": (_sdnq, 0.05),
        "bitsandbytes NF4": (_bitsandbytes, 0.2),
    }
    if ggml is not None:
        builders["ggml Q4_0"] = (lambda layer: ggml.linear(layer, "Q4_0"), 0.2)
        builders["ggml TQ2_0, ternary"] = (lambda layer: ggml.linear(layer, "TQ2_0"), 0.05)
    found = {}
    for name, (build, tolerance) in builders.items():
        if any(name.startswith(prefix) for prefix in skip):
            continue
        layer = torch.nn.Linear(in_features, columns, bias=False).eval().requires_grad_(False)
        layer.weight.copy_(torch.randn(columns, in_features) * 0.02)
        if name.startswith("ggml TQ2_0"):
            layer.weight.copy_(torch.randint(-1, 2, (columns, in_features)) * 0.02)
        dense = layer.weight.detach().clone()
        try:
            call = build(layer)
            with torch.no_grad():
                call(torch.randn(2, in_features))
        except ImportError:
            continue
        except Exception as error:
            print(f"{name} does not run here: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        found[name] = (call, dense, tolerance)
    return found
