"""What can be seen of speed without a GPU: compiled steps agree with plain ones and compile no more after the
first, steps never wait for the device, bfloat16 on request, and the benchmark's line."""
import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import benchmark
import train_cifar
import train_imagenet

SETTINGS = {train_cifar: ["--smoke", "--batch-size", "8", "--attack-steps", "2", "--extra-sigma"],
            train_imagenet: ["--smoke", "--image-size", "32", "--batch-size", "8", "--attack-steps", "2",
                             "--workers", "0"]}


def setting(script, folder, *more):
    """Arguments, the first four batches, the teacher, and a function that builds a run."""
    if script is train_cifar:
        args = script.parse_args([*SETTINGS[script], *more])
        data, teacher = script.Data(args, torch.device("cpu")), script.load_teacher(args)
    else:
        script.draw_smoke_folders(folder, 0)
        args = script.parse_args([*SETTINGS[script], "--data", str(folder), *more])
        data = script.Data(args, torch.device("cpu"))
        teacher = script.load_teacher(args, data)
        data.latent_shape = teacher.latent_shape
    batches = [data.batch(step) for step in range(4)]
    return args, batches, teacher, lambda: script.build_run(args, data, teacher)


def take_step(script, run, teacher, batch, args):
    """One training step of a run. Returns its numbers."""
    return script.train_step(run.model, run.averaged, run.projectors, teacher, run.optimizer, batch, 0.5,
                             args)


@pytest.mark.parametrize("script", SETTINGS, ids=lambda script: script.__name__)
def test_compiled_steps_agree_and_compile_no_more_after_the_first(script, tmp_path, monkeypatch):
    """As on CUDA, but through a backend that needs no C++ compiler: the same graphs are captured, and run
    with eager kernels."""
    args, batches, teacher, build = setting(script, tmp_path)
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiler(function, dynamic=dynamic,
                                                                             backend="aot_eager"))
    losses, graphs = {}, []
    for compiled in (False, True):
        run = build()
        args.device = "cuda" if compiled else "cpu"  # compile_parts looks at nothing else of it
        for step in range(4):
            if step == 1:  # the first step of train_cifar.py is another graph, for its batch norm momentum
                torch._dynamo.reset()
                script.compile_parts(args, run.model, teacher)
            losses[compiled, step] = take_step(script, run, teacher, batches[step], args)["loss"]
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert set(run.model.state_dict()) == set(run.averaged.state_dict()), "names of parameters stay clean"
    torch.testing.assert_close(losses[True, 1], losses[False, 1], rtol=1e-3, atol=1e-4)
    assert graphs[3] == graphs[0], "the first run does not compile"
    assert graphs[5] > graphs[4], "the second does, in its first compiled step"
    assert graphs[5] == graphs[6] == graphs[7], "and never again"
    torch._dynamo.reset()


def run_benchmark(script, capsys, *flags):
    """What tests/benchmark.py prints for that script's small setting."""
    benchmark.main([f"{script.__name__}.py", *SETTINGS[script], "--steps", "2", *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("script", SETTINGS, ids=lambda script: script.__name__)
def test_benchmark_prints_one_line_of_json(script, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "WARMUP", 1)
    line = run_benchmark(script, capsys, "--peak-tflops", "0.5")
    parts = line["seconds"]
    assert line["batch_size"] == 8 and line["device"] == "cpu"
    assert not line["compiled"] and line["peak_memory_gib"] > 0.1
    assert set(parts) == {"step", "data", "attack", "teacher", "update"}
    assert min(parts["data"], parts["attack"], parts["teacher"]) > 0
    assert line["images_per_s"] == pytest.approx(8 / parts["step"], rel=0.01)
    assert line["tflops"] == pytest.approx(line["gflop_per_image"] * line["images_per_s"] / 1000, rel=0.01)
    assert line["share_of_peak"] == pytest.approx(line["tflops"] / 0.5, rel=0.01)
    # FLOPs: 2 x 2 forward passes in the attack and 6 in the update, and the teacher's.
    plain = run_benchmark(script, capsys, "--dra-weight", "0")
    fewer = run_benchmark(script, capsys, "--dra-weight", "0", "--attack-steps", "1")
    assert plain["gflop_per_image"] < line["gflop_per_image"]
    assert fewer["gflop_per_image"] / plain["gflop_per_image"] == pytest.approx(8 / 10, rel=1e-3)


@pytest.mark.parametrize("script", SETTINGS, ids=lambda script: script.__name__)
def test_benchmark_splits_a_step_into_its_parts(script, capsys, monkeypatch):
    """By a clock of its own: an attack takes 1 s, the teacher 0.25 s and the rest of a step 2.25 s."""
    clock = [0.0]

    def takes(module, name, seconds):
        function = getattr(module, name)

        def timed(*arguments):
            clock[0] += seconds
            return function(*arguments)
        monkeypatch.setattr(module, name, timed)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(benchmark, "WARMUP", 1)
    takes(script, "trades_attack", 1.0)
    takes(benchmark, "ask_teacher", 0.25)
    takes(script, "train_step", 2.5)
    parts = run_benchmark(script, capsys)["seconds"]  # a step is 2.5 s and the attack in it
    assert parts == {"step": 3.5, "data": 0.0, "attack": 1.0, "teacher": 0.25, "update": 2.25}


def test_flops_of_a_full_size_wrn_are_counted_right():
    """WRN-28-10 has 5.2 billion multiply-adds per 32 px image (its paper's model size times positions), so
    10.5 GFLOP forward."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        model = train_cifar.build_model("wrn-28-10", 10).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.head(model.penultimate(torch.zeros(1, 3, 32, 32)))
    assert counter.get_total_flops() / 1e9 == pytest.approx(10.5, rel=0.01)


@pytest.mark.parametrize("script", SETTINGS, ids=lambda script: script.__name__)
def test_a_step_never_waits_for_its_numbers_nor_makes_any_on_the_host(script, tmp_path, monkeypatch):
    """Run where tensors have shapes but no values ("meta"): reading one back fails there, and one made on the
    CPU is noticed."""
    class HostTensors(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            leaves = tree_leaves((args, kwargs, result))
            if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in leaves):
                on_host.append(operation)
            return result
    on_host = []
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    more = [] if script is train_cifar else ["--arch", "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"]
    args, batches, teacher, build = setting(script, tmp_path, *more)
    run, on_meta = build(), lambda tensor: tensor.to("meta")
    batch = SimpleNamespace(**tree_map_only(torch.Tensor, on_meta, vars(batches[0])))
    for module in (run.model, run.averaged, run.projectors, teacher):
        module.to("meta")
    run.optimizer = script.build_optimizer(args, run.model, run.projectors)
    with HostTensors():
        for _ in range(2):
            numbers = take_step(script, run, teacher, batch, args)
    assert not on_host and all(value.device.type == "meta" for value in numbers.values())
    with pytest.raises(RuntimeError):
        numbers["loss"].item()


@pytest.mark.parametrize("script", SETTINGS, ids=lambda script: script.__name__)
def test_bfloat16_moves_the_first_steps_loss_by_less_than_a_percent(script, tmp_path):
    """The backbone in bfloat16, as on CUDA by default, but on a CPU; logits and losses stay float32."""
    args, batches, teacher, build = setting(script, tmp_path)
    losses = []
    for args.amp in (False, True):
        numbers = take_step(script, build(), teacher, batches[0], args)
        assert all(value.dtype == torch.float32 for value in numbers.values())
        losses.append(numbers["trades"].item())
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)
