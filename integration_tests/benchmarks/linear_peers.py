# SPDX-License-Identifier: Apache-2.0
"""Linear layers of other low-bit libraries on the CPU, for bench_linear_cpu.py; what is not installed is left out."""

import sys
from collections.abc import Callable

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


def peers(columns: int, in_features: int, skip: list[str]) -> dict[str, tuple[Call, torch.Tensor, float]]:
    """Calls, the dense weights they stand for, and the error that their bits excuse; failures are reported."""
    builders: dict[str, tuple[Callable[[torch.nn.Linear], Call], float]] = {
        "torch dynamic int8, oneDNN": (lambda layer: _torch_dynamic(layer, "onednn"), 0.05),
        "torch dynamic int8, FBGEMM": (lambda layer: _torch_dynamic(layer, "fbgemm"), 0.05),
        "ONNX Runtime int8": (_onnxruntime, 0.05),
        "OpenVINO int8": (_openvino, 0.05),
        "torchao int8 weight-only": (lambda layer: _torchao(layer, "Int8WeightOnlyConfig"), 0.05),
        "torchao int8": (lambda layer: _torchao(layer, "Int8DynamicActivationInt8WeightConfig"), 0.05),
        "SDNQ int8": (_sdnq, 0.05),
        "bitsandbytes NF4": (_bitsandbytes, 0.2),
    }
    found = {}
    for name, (build, tolerance) in builders.items():
        if any(name.startswith(prefix) for prefix in skip):
            continue
        layer = torch.nn.Linear(in_features, columns, bias=False).eval().requires_grad_(False)
        layer.weight.copy_(torch.randn(columns, in_features) * 0.02)
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
