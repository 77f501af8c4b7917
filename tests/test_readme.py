"""What README.md promises of its commands: each is understood by its script, each row of the CIFAR tables
makes a plan, and the smoke runs run."""
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import EDM, ROOT, run, write_sparse_npz
import train_cifar


def commands():
    """(script, its arguments) for each `python SCRIPT.py ...` in the README's code, with shell variables put
    in."""
    variables = {}
    text = (ROOT / "README.md").read_text()
    code = re.findall(r"^    ((?:python|pip|torchrun|[A-Z]=).*)", text.replace("\\\n", " "), re.MULTILINE)
    for line in [part for line in code for part in line.split(" && ")] + re.findall("`(python [^`]*)`", text):
        words = shlex.split(line, comments=True)
        name, _, value = (words or [""])[0].partition("=")
        if name.isidentifier() and value:
            variables[name] = [word for part in value.split()
                               for word in variables.get(part.removeprefix("$"), [part])]
        words = [word for part in words for word in (variables[part[1:]] if part[:1] == "$" else [part])]
        for i, word in enumerate(words):
            if word.endswith(".py") and words[i - 1] in ("python", "--", "&&"):
                yield word, words[i + 1:]


def test_the_readme_has_the_commands_of_all_scripts():
    named = {script for script, _ in commands()}
    paths = [*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")]
    there = {path.relative_to(ROOT).as_posix() for path in paths}
    assert there - named <= {"edm_encoder.py", "experiments/robustbench_models.py"}
    assert all((ROOT / script).exists() for script in named)
    assert sum(script == "train_cifar.py" for script, _ in commands()) >= 14


@pytest.mark.parametrize("script, arguments", [pair for pair in commands() if "tests/" not in pair[0]],
                         ids=lambda value: " ".join([value] if isinstance(value, str) else value)[:80])
def test_each_command_is_understood(script, arguments):
    module = importlib.import_module(Path(script).stem)
    own = getattr(module, "parse_args", None)
    if arguments not in ([], ["--help"]) and own and own.__module__ == module.__name__:
        own(arguments)


SHORTER = {"train_cifar.py": ["--max-steps", "2"], "train_imagenet.py": ["--max-steps", "2"],
           "experiments/train_edm.py": ["--images", "64"]}


@pytest.mark.slow
@pytest.mark.parametrize("script, arguments", [pair for pair in commands() if "--smoke" in pair[1]],
                         ids=lambda value: value if isinstance(value, str) else "")
def test_each_smoke_run_runs(script, arguments, tmp_path):
    """But for its length."""
    done = run(script, *arguments, *SHORTER[script], "--out", tmp_path / "run")
    assert done.code == 0, done.err


@pytest.mark.slow
def test_each_row_of_the_cifar_tables_makes_a_plan(tmp_path, monkeypatch, capsys):
    """With black images in files of the released names and lengths, a tenth of the real images, and no
    weights in the networks."""
    monkeypatch.chdir(tmp_path)

    def without_weights(arch, *rest):
        with torch.device("meta"):
            build_model(arch, *rest)
        return build_model("wrn-10-1", *rest)
    build_model = train_cifar.build_model
    monkeypatch.setattr(train_cifar, "build_model", without_weights)
    (tmp_path / "cifar100").mkdir()
    for folder, classes in (("data", 10), ("data100", 100)):
        (tmp_path / folder).mkdir()
        for split in ("train", "test"):
            np.savez(tmp_path / folder / split, image=np.zeros((5000, 32, 32, 3), np.uint8),
                     label=np.arange(5000) % classes)
    np.savez(tmp_path / "cifar100" / "1m.npz", image=np.zeros((1000, 32, 32, 3), np.uint8),
             label=np.arange(1000) % 100)
    for name, parts, count in (("1m", 1, 10**6), ("20m", 2, 10**7), ("50m", 4, 12_500_000)):
        for part in range(parts):
            write_sparse_npz(tmp_path / (f"{name}_part{part + 1}.npz" if parts > 1 else f"{name}.npz"), count)
    for script, arguments in commands():
        if script == "train_cifar.py" and "--out" in arguments and "--data-dir" not in arguments:
            files = [name for word in arguments
                     for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
            if "cifar100" in arguments:
                # the tiny teacher knows ten classes
                files += ["--data-dir", "data100", "--teacher-unconditional"]
            train_cifar.main([*files, "--teacher", str(EDM), "--device", "cpu", "--dry-run"])
            plan = capsys.readouterr().out
            args = train_cifar.parse_args(arguments)
            assert f"{args.epochs * -(-5000 // args.batch_size):,} steps = {args.epochs} epochs" in plan
    assert not (tmp_path / "runs").exists()
