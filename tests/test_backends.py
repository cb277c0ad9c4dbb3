"""Choosing a backend: by call, context, thread and process; what there is; and what happens under torch.compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import types

import pytest
import torch

import llmfast
from llmfast import ops
from llmfast.backends import BackendUnavailable, load_backend, registered, resolve, select
from llmfast.models.llama import Llama, LlamaConfig

CPU = torch.device("cpu")


def chosen(op: str = "gelu", dtype: torch.dtype = torch.float32) -> str:
    return resolve(op, CPU, dtype)[0]


def available(backend: str) -> bool:
    return any(row.backend == backend and row.device == "cpu" and row.available for row in llmfast.backends())


needs_cpp = pytest.mark.skipif(not available("cpp"), reason="the C++ extension is not built here")


@pytest.fixture
def doubler():
    """A third party's backend with one op, registered for the length of a test."""
    from llmfast import backends as package

    registry = sys.modules["llmfast.backends"]._registry
    module = types.SimpleNamespace(gelu=lambda x, approximate="tanh": 2 * x)
    llmfast.register_backend("doubler", module)
    yield module
    del registry["doubler"]
    assert package


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a fresh process, away from the checkout, so that it is the installed package that answers."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=tempfile.gettempdir(),
        check=False,
    )


@needs_cpp
def test_auto_is_cpp_on_a_cpu_and_pytorch_for_what_cpp_does_not_know():
    assert chosen() == "cpp"
    assert chosen(dtype=torch.float64) == "pytorch"
    assert "float32 and bfloat16" in llmfast.explain("gelu", torch.ones(2, dtype=torch.float64)).reason


def test_use_backend_nests_and_restores():
    before = chosen()
    with llmfast.use_backend("reference"):
        assert chosen() == "reference"
        with llmfast.use_backend("torch"):
            assert chosen() == "pytorch"
        assert chosen() == "reference"
    assert chosen() == before


def test_use_backend_restores_after_an_error():
    before = chosen()
    with pytest.raises(RuntimeError, match="inside"), llmfast.use_backend("reference"):
        raise RuntimeError("inside")
    assert chosen() == before


def test_a_mapping_changes_only_the_ops_it_names():
    with llmfast.use_backend("pytorch"), llmfast.use_backend({"gelu": "reference"}):
        assert chosen("gelu") == "reference"
        assert chosen("linear") == "pytorch"


@pytest.mark.parametrize(
    "backend, message",
    [("nonsense", "unknown backend 'nonsense'; known: auto"), ({"softmax": "pytorch"}, "unknown op 'softmax'")],
)
def test_unknown_names_are_errors(backend, message):
    with pytest.raises(ValueError, match=message), llmfast.use_backend(backend):
        pass


def test_the_choice_belongs_to_the_thread():
    seen = []
    with llmfast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen and seen[0] != "reference"


def test_a_named_backend_that_can_not_run_raises_and_says_why(doubler):
    with llmfast.use_backend("doubler"), pytest.raises(BackendUnavailable, match="does not define linear"):
        ops.linear(torch.ones(2, 2), torch.ones(2, 2))


def test_a_registered_backend_is_used_and_listed(doubler):
    with llmfast.use_backend({"gelu": "doubler"}):
        assert torch.equal(ops.gelu(torch.ones(3)), torch.full((3,), 2.0))
    rows = {(row.backend, row.op): row for row in llmfast.backends()}
    assert rows["doubler", "gelu"].available
    assert "does not define" in rows["doubler", "linear"].reason


@pytest.mark.parametrize("name, module", [("auto", types.SimpleNamespace(gelu=1)), ("x", types.SimpleNamespace())])
def test_a_backend_needs_a_free_name_and_an_op(name, module):
    with pytest.raises(ValueError):
        llmfast.register_backend(name, module)


def test_an_installed_package_announces_a_backend(tmp_path):
    package = tmp_path / "someones_kernels.py"
    package.write_text("def gelu(x, approximate='tanh'):\n    return x - 1\n")
    info = tmp_path / "someones_kernels-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someones-kernels\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llmfast.backends]\nsomeones = someones_kernels\n")
    code = (
        "import torch, llmfast; from llmfast import ops\n"
        "assert any(r.backend == 'someones' and r.op == 'gelu' and r.available for r in llmfast.backends())\n"
        "with llmfast.use_backend({'gelu': 'someones'}): print(ops.gelu(torch.ones(1)).item())"
    )
    result = run_python(code, PYTHONPATH=str(tmp_path))
    assert result.stdout.strip() == "0.0", result.stderr


@pytest.fixture
def folder_of_kernels(tmp_path, monkeypatch):
    """The current folder, with somebody's modules; what is registered or put on the path there is forgotten after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    registry = sys.modules["llmfast.backends"]._registry
    monkeypatch.setattr(sys.modules["llmfast.backends"], "_registry", registry.copy())
    (tmp_path / "neighbour.py").write_text("def identity(x): return x\n")
    (tmp_path / "their-kernels.py").write_text(
        "from neighbour import identity\ndef gelu(x, approximate='tanh'): return identity(x)\n"
    )
    (tmp_path / "theirs_as_package").mkdir()
    (tmp_path / "theirs_as_package" / "kernels.py").write_text("def gelu(x, approximate='tanh'): return 3 * x\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "fails.py").write_text("one = 1\nbroken = one / 0\n")
    (tmp_path / "triton.py").write_text("def gelu(x, approximate='tanh'): return x\n")
    return tmp_path


def test_a_backend_is_loaded_by_name_from_a_file_or_from_a_module(folder_of_kernels):
    assert load_backend("torch") == "pytorch" and load_backend("auto") == "auto"
    for _ in range(2):  # what is loaded already is found again
        assert load_backend("their-kernels.py") == load_backend("./their-kernels.py") == "their_kernels"
        assert load_backend("theirs_as_package.kernels") == "theirs_as_package_kernels"
    with llmfast.use_backend({"gelu": "theirs_as_package_kernels"}):
        assert torch.equal(ops.gelu(torch.ones(2)), torch.full((2,), 3.0))


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("nowhere.py", ValueError, "there is no file nowhere.py"),
        ("nowhere.at_all", ValueError, "unknown backend 'nowhere.at_all'.*known: auto, pytorch"),
        ("no name", ValueError, "not the name of a module"),
        ("empty.py", ValueError, "defines none of the ops"),
        ("triton.py", ValueError, "another backend has that name"),
        ("fails.py", BackendUnavailable, "ZeroDivisionError: division by zero .*fails.py, line 2"),
    ],
)
def test_a_backend_that_can_not_be_loaded_says_why(folder_of_kernels, text, error, message):
    with pytest.raises(error, match=message):
        load_backend(text)


def test_the_environment_chooses_for_the_process():
    code = "import torch, llmfast; print(llmfast.explain('gelu', torch.ones(1)).backend)"
    assert run_python(code, LLMFAST_BACKEND="torch").stdout.strip() == "pytorch"
    result = run_python(code, LLMFAST_BACKEND="nonsense")
    assert "unknown backend 'nonsense'" in result.stderr.splitlines()[-1]


def test_explain_says_which_and_why_and_raises_where_the_call_would():
    x = torch.ones(2, 4)
    with llmfast.use_backend("pytorch"):
        said = llmfast.explain("layer_norm", x, torch.ones(4), None)
    assert (said.op, said.backend, said.reason) == ("layer_norm", "pytorch", "chosen by name")
    assert "layer_norm -> pytorch" in str(said)
    with pytest.raises(ValueError, match="unknown op"):
        llmfast.explain("softmax", x)


def test_without_the_interpreter_triton_says_what_it_needs():
    code = (
        "import json, llmfast\n"
        "print(json.dumps([r.reason for r in llmfast.backends() if r.backend == 'triton' and r.device == 'cpu']))"
    )
    reasons = json.loads(run_python(code, TRITON_INTERPRET="0").stdout)
    assert reasons and all("TRITON_INTERPRET=1" in r or "not installed" in r for r in reasons)


@needs_cpp
def test_without_the_extension_cpp_says_why_and_auto_goes_on():
    code = (
        "import torch, pathlib; glob = pathlib.Path.glob\n"
        "pathlib.Path.glob = lambda self, pattern: [] if pattern.startswith('_C') else glob(self, pattern)\n"
        "import llmfast\n"
        "print(llmfast.explain('gelu', torch.ones(1)))"
    )
    said = run_python(code).stdout
    assert "gelu -> pytorch" in said and "install a C++17 compiler" in said


# --- operators that PyTorch understands -----------------------------------------------------------------------------


def namespaces() -> list[str]:
    found = ["llmfast"] if available("cpp") else []
    return found + (["llmfast_triton"] if available("triton") else [])


def samples() -> dict[str, tuple]:
    torch.manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=True)

    q, k, v = leaf(2, 2, 5, 16), leaf(2, 2, 7, 16), leaf(2, 2, 7, 16)
    x, w, b = leaf(3, 4, 8), leaf(8), leaf(8)
    return {
        "causal_attention": (q, k, v, 0.25, 0.0, None, None, 0, True),
        "causal_attention in a window": (q, k, v, 0.25, 0.0, None, torch.tensor([7, 4]), 3, True),
        "causal_attention both ways": (k, q, q, 0.25, 0.5, torch.tensor([3]), None, 0, False),
        "layer_norm": (x, w, b, 1e-5),
        "add_layer_norm": (x, leaf(3, 4, 8), w, None, 1e-5),
        "rms_norm": (x, w, 1e-6),
        "add_rms_norm": (x, leaf(3, 4, 8), w, 1e-6),
        "rotary": (q, torch.randn(1, 5, 6), torch.randn(1, 5, 6), True),
        "gelu": (x, "tanh"),
        "linear": (x, leaf(6, 8), leaf(6), "gelu_tanh", True),
        "gated_linear": (x, leaf(6, 8), leaf(6, 8), None, leaf(6), "silu", True),
        "linear_cross_entropy": (leaf(5, 8), leaf(11, 8), torch.tensor([1, 10, -100, 0, 3]), -100),
    }


@pytest.mark.parametrize("op", list(samples()))
@pytest.mark.parametrize("namespace", namespaces())
def test_opcheck(namespace, op):
    operator = getattr(getattr(torch.ops, namespace), op.split()[0]).default
    torch.library.opcheck(operator, samples()[op])


@pytest.mark.parametrize("op", list(registered.SCHEMAS))
@pytest.mark.parametrize("namespace", namespaces())
def test_the_operators_have_the_shared_schemas(namespace, op):
    schema = str(getattr(getattr(torch.ops, namespace), op).default._schema)
    declared = torch._C.parse_schema(f"{namespace}::{op}{registered.SCHEMAS[op]}")
    assert schema == str(declared)


@pytest.mark.parametrize("backend", ["pytorch", "cpp", "triton"])
def test_a_compiled_function_follows_the_choice_of_backend(backend):
    if not available(backend):
        pytest.skip(f"{backend} can't run here")
    torch._dynamo.reset()
    compiled_with = []

    def recording_compiler(graph, example_inputs):
        compiled_with.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    function = torch.compile(lambda x: ops.gelu(x), fullgraph=True, backend=recording_compiler)
    x = torch.randn(8)
    with llmfast.use_backend("reference"):
        assert function(x).dtype == torch.float64
    with llmfast.use_backend(backend):
        assert function(x).dtype == torch.float32
        function(x)
    with llmfast.use_backend("reference"):
        assert function(x).dtype == torch.float64
    assert len(compiled_with) == 2  # one graph a backend, each used again


def tiny(family: str) -> torch.nn.Module:
    if family == "gpt2":
        return llmfast.GPT(llmfast.GPTConfig(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 16, "sliding_window": 4}
    return Llama(LlamaConfig(model_type="mistral", vocab_size=50, **sizes, **more))


@pytest.mark.parametrize("backend", ["pytorch", "cpp", "triton"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_model_compiles_in_one_graph_forward_and_backward(family, backend):
    if not available(backend):
        pytest.skip(f"{backend} can't run here")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = tiny(family).eval()
    ids, targets = torch.randint(50, (2, 9)), torch.randint(50, (2, 9))
    with llmfast.use_backend(backend):
        expected = model(ids)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids)
        loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(ids, targets)
        compiled_gradients = torch.autograd.grad(loss, list(model.parameters()))
        gradients = torch.autograd.grad(model.loss(ids, targets), list(model.parameters()))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for compiled_gradient, gradient in zip(compiled_gradients, gradients, strict=True):
        torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_select_gives_the_function_itself():
    with llmfast.use_backend("pytorch"):
        assert select("gelu", torch.ones(1)).__module__ == "llmfast.backends.pytorch"


@needs_cpp
@pytest.mark.parametrize("op", ["causal_attention", "bidirectional_attention"])
def test_heads_too_wide_for_the_kernels_go_to_pytorch_and_it_is_said(op):
    q = torch.randn(1, 1, 4, 320)
    assert getattr(ops, op)(q, q, q).shape == q.shape
    assert "heads of up to 256 channels, not 320" in str(llmfast.explain(op, q, q, q))
    with llmfast.use_backend("cpp"), pytest.raises(BackendUnavailable, match="not 320"):
        getattr(ops, op)(q, q, q)


def test_a_backend_without_windows_serves_calls_that_have_none(monkeypatch):
    """One written before there were windows."""
    package = sys.modules["llmfast.backends"]
    monkeypatch.setattr(package, "_registry", package._registry.copy())

    def causal_attention(q, k, v, *, scale, dropout_p, dropout_seed, kv_lengths):
        return q

    llmfast.register_backend("windowless", types.SimpleNamespace(causal_attention=causal_attention))
    q = torch.randn(1, 1, 4, 8)
    with llmfast.use_backend({"causal_attention": "windowless"}):
        assert ops.causal_attention(q, q, q) is q
        with pytest.raises(TypeError, match="window"):
            ops.causal_attention(q, q, q, window=2)


def test_a_built_in_backend_is_not_replaced():
    with pytest.raises(ValueError, match="can't be the name"):
        llmfast.register_backend("cpp", types.SimpleNamespace(gelu=1))


def test_models_run_on_the_meta_device():
    with torch.device("meta"):
        model = llmfast.GPT(llmfast.GPTConfig(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2))
        assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 50)
