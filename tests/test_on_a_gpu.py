"""tests/on_a_gpu.py in small: its jobs find on a CPU what they look for on a GPU, and one that fails takes no
other with it."""
import itertools
from types import SimpleNamespace

import pytest
import torch

import benchmark
import on_a_gpu
import train_cifar

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="run it by hand")


def run(name, folder, monkeypatch):
    """A job's rows: {what: (measured, as expected)}."""
    monkeypatch.setattr(on_a_gpu, "OUT", SimpleNamespace(report=folder / "report.md", job=name))
    monkeypatch.setattr(benchmark, "WARMUP", 1)
    _, job, script, _ = on_a_gpu.JOBS[name]
    job(script, on_a_gpu.TINY[script].split())
    lines = on_a_gpu.OUT.report.read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[2:6]] for line in lines]
    return {what: (measured, good) for what, measured, _, good in rows}


def test_agreement_tells_what_agrees_from_what_does_not(tmp_path, monkeypatch):
    """Here a loss that grows from call to call, with the same gradients."""
    loss, calls = train_cifar.trades_loss, itertools.count()
    monkeypatch.setattr(train_cifar, "trades_loss", lambda *arguments: loss(*arguments) + next(calls))
    found = run("a WRN-28-10, EDM", tmp_path, monkeypatch)
    torch._dynamo.reset()
    assert [good for _, good in found.values()] == ["**NO**", "**NO**", "yes", "yes", "", "yes", "yes"], found


@pytest.mark.parametrize("name", ["b WRN-28-10", "b WRN-28-10, textbook", "c WRN-28-10", "d WRN-34-10"])
def test_speed_is_measured(name, tmp_path, monkeypatch):
    assert len(run(name, tmp_path, monkeypatch)) == 1


def test_a_job_that_fails_or_hangs_leaves_a_row_and_the_next_one_runs(tmp_path, monkeypatch):
    textbook = on_a_gpu.JOBS["b WRN-28-10, textbook"]
    jobs = {"a job that is not there": textbook, "b WRN-28-10, textbook": textbook}
    monkeypatch.setattr(on_a_gpu, "JOBS", jobs)
    on_a_gpu.main(["--minutes", "5", "--parts", "a", "b", "--report", str(tmp_path / "report.md")])
    on_a_gpu.run_job("b WRN-28-10, textbook", 0.1)
    failed, ran, hung = (tmp_path / "report.md").read_text().splitlines()[-3:]
    assert "a job that is not there |  | FAILED" in failed and "**NO**" in failed
    assert "ours" in ran and "textbook" in ran and "not done after 0 s" in hung
